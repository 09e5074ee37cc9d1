"""Turns of a conversation in anyone's words → messages. Tools and their calls become text in the messages.

Enters: OpenAI {role, content, tool_calls}, ShareGPT {from, value}, ChatML text. Leaves: messages, or a Fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from microlm.core.records import ROLES, Message, Role
from microlm.text.read import Fault, check_strings, shown

_ROLE_WORDS: Mapping[str, Role] = {
    **{r: r for r in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", re.DOTALL)


def field(data: Mapping[str, Any], key: str, expected: str | None = None) -> str:
    """The text under a key, or a Fault that says what stands there; a missing key is named `expected`."""
    if key not in data:
        found = ", ".join(shown(k) for k in list(data)[:5]) or "no keys"
        raise Fault(
            f"missing_field:{expected or key} (found {found})", f"no key '{expected or key}'; found {found}"
        )
    value = data[key]
    if value is None:
        raise Fault(f"{key}_null", f"'{key}' is null")
    if not isinstance(value, str):
        raise Fault(f"{key}_not_a_string", f"'{key}' is {type(value).__name__}, expected a string")
    if not value.strip():
        raise Fault(f"{key}_empty", f"'{key}' is empty")
    return value


def dialogue(turns: Any, data: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages of a conversation; `system` and `tools` of the object become its system message.

    A column of a table may hold the turns as a JSON text.
    """
    turns = parsed(turns)
    if not isinstance(turns, list) or not turns:
        raise Fault("bad_messages", "'messages' must be a list of at least one {role, content}")
    messages = tuple(_message(turn) for turn in turns)
    head = [system] if isinstance(system := data.get("system"), str) and system.strip() else []
    if messages[0].role == "system" and (head or data.get("tools")):
        head.append(messages[0].content)
        messages = messages[1:]
    if tools := data.get("tools"):
        head.append(_tools(tools))
    return (Message("system", "\n\n".join(head)), *messages) if head else messages


def parse_chatml(text: str) -> list[dict[str, str]]:
    """The turns of `<|im_start|>role⏎content<|im_end|>…`; what lies between or after them is a Fault."""
    text = text.strip()
    turns, at = [], 0
    while turn := _TURN.match(text, at):
        turns.append({"role": turn[1], "content": turn[2]})
        at = turn.end()
    if at < len(text) or any("<|im_start|>" in turn["content"] for turn in turns):
        raise Fault(
            "bad_chatml", f"turn {len(turns) + 1} is not <|im_start|>role, a line end, text and <|im_end|>"
        )
    return turns


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Fault(
            "bad_messages", f"a message is {type(turn).__name__}, expected an object {{role, content}}"
        )
    word = turn["role"] if turn.get("role") is not None else turn.get("from")
    role = _ROLE_WORDS.get(word) if isinstance(word, str) else None
    if role is None:
        raise Fault("bad_role", f"role '{shown(word)}' is not one of {', '.join(ROLES)}")
    calls = turn.get("tool_calls") or turn.get("function_call")
    content = _content(turn, may_be_empty=bool(calls))
    thought = turn.get("reasoning_content")
    if isinstance(thought, str) and thought.strip():
        content = f"<think>\n{thought}\n</think>\n\n{content}"
    if calls:
        content = "\n".join([*([content] if content else []), *_calls(calls)])
    elif word == "function_call":
        content = _call(content)
    if role == "system" and turn.get("tools"):
        content = f"{content}\n\n{_tools(turn['tools'])}"
    return Message(role, content)


def _content(turn: Mapping[str, Any], may_be_empty: bool) -> str:
    """The text of a turn; of OpenAI's list of parts, the texts."""
    key = "value" if "value" in turn and turn.get("content") is None else "content"
    value = turn.get(key)
    if may_be_empty and not value:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        kinds = {part.get("type") for part in value}
        if kinds != {"text"}:
            other = ", ".join(sorted(shown(kind) for kind in kinds - {"text"}))
            raise Fault("not_only_text", f"a part of the message is {other}, only text can be learnt from")
        return "\n".join(field(part, "text") for part in value)
    return field(turn, key)


def _calls(value: Any) -> list[str]:
    """OpenAI's `tool_calls` (or the older single `function_call`), each as text."""
    value = parsed(value)
    calls = value if isinstance(value, list) else [value]
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault("bad_tool_call", "a tool call needs a function with a name")
        arguments = parsed(function.get("arguments") or {})
        found.append(_call(_dumped({"name": function["name"], "arguments": arguments})))
    return found


def _call(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


def _tools(value: Any) -> str:
    return f"<tools>\n{value if isinstance(value, str) else _dumped(value)}\n</tools>"


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # a table may hold dates


def parsed(value: Any) -> Any:
    """The value of a JSON text (a cell of a table, a tool call's arguments); anything else stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return check_strings({"": json.loads(value)})[""]
    except (ValueError, RecursionError):
        return value
