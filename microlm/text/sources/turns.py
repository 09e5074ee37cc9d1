"""Turns of a conversation in anyone's words → messages, and the tools that they may call.

Enters: OpenAI {role, content, tool_calls}, ShareGPT {from, value}, ChatML text. Leaves: messages, or a Fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from microlm.core.records import ROLES, Message, Role, ToolCall
from microlm.text.read import Fault, shown
from microlm.text.sources.marked import parse_answer, parsed, split_tools, tool_call, tool_text

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
_RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
_RESPONSES = re.compile(r"(?:<tool_response>(?:(?!</?tool_response>).)*</tool_response>\s*)+", re.DOTALL)


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


def dialogue(turns: Any, data: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The messages of a conversation, and its tools; `system` of the object joins its system message.

    A column of a table may hold the turns as a JSON text.
    """
    turns = parsed(turns)
    if not isinstance(turns, list) or not turns:
        raise Fault("bad_messages", "'messages' must be a list of at least one {role, content}")
    messages = [_message(turn) for turn in turns]
    tools = _tools(data.get("tools"))
    for turn, message in zip(turns, messages, strict=True):
        tools += _tools(turn.get("tools")) if message.role == "system" else ()
    messages = [m for m in messages if m.content or m.role != "system"]  # one that held tools alone
    system = data.get("system")
    if isinstance(system, str) and system.strip():
        if messages and messages[0].role == "system":
            system = f"{system}\n\n{messages.pop(0).content}"
        messages.insert(0, Message("system", system))
    if not messages:
        raise Fault("bad_messages", "'messages' holds no turn but that of the system, which is empty")
    return tuple(messages), tools


def parse_chatml(text: str) -> list[dict[str, Any]]:
    """The turns of `<|im_start|>role⏎content<|im_end|>…`; what lies between or after them is a Fault.

    Tools and their results are written as Qwen does it: a section of the system turn, and
    `<tool_response>` blocks in a turn of the user or of the tool.
    """
    text = text.strip()
    turns: list[dict[str, Any]] = []
    at = 0
    while turn := _TURN.match(text, at):
        if "<|im_start|>" in turn[2]:
            break
        turns += _chatml_turns(turn[1], turn[2])
        at = turn.end()
    if at < len(text):
        raise Fault(
            "bad_chatml", f"after {at} characters: not <|im_start|>role, a line end, text, <|im_end|>"
        )
    return turns


def _chatml_turns(role: str, content: str) -> Iterator[dict[str, Any]]:
    if role == "system":
        said, tools = split_tools(content)
        yield {"role": role, "content": said, "tools": tools}
    elif role in ("user", "tool") and _RESPONSES.fullmatch(content):
        yield from ({"role": "tool", "content": said} for said in _RESPONSE.findall(content))
    else:
        yield {"role": role, "content": content}


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
    content = _content(turn, may_be_empty=bool(calls or (role == "system" and turn.get("tools"))))
    if word == "function_call":
        return Message(role, "", tool_calls=_calls(content))
    if role == "assistant":
        return _answer(turn, content, _calls(calls))
    inner = _RESPONSE.fullmatch(content) if role == "tool" else None
    return Message(role, inner[1] if inner else content)


def _answer(turn: Mapping[str, Any], content: str, calls: tuple[ToolCall, ...]) -> Message:
    """The assistant's message: thinking and calls of the fields, and those of the marks in its words."""
    said = parse_answer(content)
    field_of_thought = turn.get("reasoning_content") or turn.get("reasoning")
    thought = field_of_thought.strip("\n") if isinstance(field_of_thought, str) else ""
    if thought.strip():
        said = replace(said, reasoning=f"{thought}\n{said.reasoning}" if said.reasoning else thought)
    if not said.content.strip() and not said.tool_calls + calls:
        raise Fault("content_empty", "the answer holds thinking and no words")
    return replace(said, tool_calls=said.tool_calls + calls) if calls else said


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


def _calls(value: Any) -> tuple[ToolCall, ...]:
    """OpenAI's `tool_calls`, or the older single `function_call`, as objects or as a JSON text."""
    value = parsed(value)
    calls = value if isinstance(value, list) else [value] if value else []
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise Fault("bad_tool_call", "a tool call needs a function with a name")
        found.append(tool_call(function.get("name"), function.get("arguments")))
    return tuple(found)


def _tools(value: Any) -> tuple[str, ...]:
    """The tools that may be called, each as the JSON text of OpenAI's `{type, function}`.

    A bare function is put into that form: it is what a server renders when it is asked with the same tool.
    """
    value = parsed(value) or []
    return tuple(tool_text(parsed(tool)) for tool in (value if isinstance(value, list) else [value]))
