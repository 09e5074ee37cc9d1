"""Thinking, tool calls and tools: as text with marks, in the form of Hermes and Qwen ↔ as fields of records.

Read as marks are: `<think>…</think>` that begins an answer, and `<tool_call>{…}</tool_call>` blocks
with which it ends. Anything else of their kind is words.
"""

from __future__ import annotations

import json
import re
from typing import Any

from microlm.core.records import Message, ToolCall
from microlm.text.read import Fault, check_strings, shown

_THINK, _THOUGHT = "<think>", "</think>"
_CALL, _CALLED = "<tool_call>", "</tool_call>"
_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
TOOLS_SECTION = (_TOOLS_HEAD, _TOOLS_TAIL)
"""What stands before and after the tools of a system turn; between them, a JSON text a line."""
_JSON = json.JSONDecoder()
_WHITE = re.compile(r"\s*")


def parse_answer(text: str) -> Message:
    """The assistant's message that a text with marks writes out; raises Fault for a call that is none."""
    reasoning, content = _thinking(text)
    content, calls = _calls_at_end(content)
    return Message("assistant", content, reasoning, calls)


def answered(text: str) -> Message:
    """What a model answered, as it goes back into the conversation; a call that is none stays text."""
    try:
        return parse_answer(text)
    except Fault:
        return Message("assistant", text)


def answer_text(message: Message) -> str:
    """A message as a text with marks, the inverse of `parse_answer`; the template writes the same."""
    thought = f"{_THINK}\n{message.reasoning}\n{_THOUGHT}\n\n" if message.reasoning else ""
    calls = (f"{_CALL}\n{call_text(call)}\n{_CALLED}" for call in message.tool_calls)
    return thought + "\n".join([*([message.content] if message.content else []), *calls])


def call_text(call: ToolCall) -> str:
    """The JSON object that stands between the marks of a call."""
    return f'{{"name": {dumped(call.name)}, "arguments": {call.arguments}}}'


def tool_call(name: Any, arguments: Any) -> ToolCall:
    """A checked call, its arguments in the one spelling that templates write; raises Fault."""
    arguments = parsed(arguments or {})
    if not isinstance(name, str) or not name:
        raise Fault("bad_tool_call", "a tool call needs a function with a name")
    if not isinstance(arguments, dict):
        raise Fault("bad_tool_call", f"the arguments of '{name[:24]}' are not a JSON object")
    try:
        return ToolCall(name, dumped(arguments))
    except ValueError:
        raise Fault("bad_tool_call", f"the arguments of '{name[:24]}' hold NaN or Infinity") from None


def tool_text(tool: Any) -> str:
    """A checked tool as the JSON text of OpenAI's `{type, function}`; raises Fault."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Fault("bad_tools", "a tool needs a function with a name")
    function = {key: value for key, value in function.items() if key != "type"}
    try:
        return dumped({"type": "function", "function": function})
    except ValueError:
        raise Fault("bad_tools", f"tool '{shown(function['name'])}' holds NaN or Infinity") from None


def dumped(value: Any) -> str:
    """JSON as templates write it (`tojson` of transformers); a table may hold dates."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)


def split_tools(system: str) -> tuple[str, list[Any]]:
    """A system turn without its section of tools, and the tools; raises Fault for what is no JSON."""
    said, found, section = system.partition(_TOOLS_HEAD)
    if not found or not section.endswith(_TOOLS_TAIL):
        return system, []
    return said.removesuffix("\n\n"), section.removesuffix(_TOOLS_TAIL).split("\n")


def parsed(value: Any) -> Any:
    """The value of a JSON text (a cell of a table, a tool call's arguments); anything else stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return check_strings({"": json.loads(value)})[""]
    except (ValueError, RecursionError):
        return value


def _thinking(text: str) -> tuple[str, str]:
    """What was thought, and the rest; without the line ends that the marks bring along."""
    start = text.lstrip()
    end = start.find(_THOUGHT)
    if not start.startswith(_THINK) or end < 0:
        return "", text
    reasoning = start[len(_THINK) : end].removeprefix("\n").removesuffix("\n")
    rest = start[end + len(_THOUGHT) :].removeprefix("\n").removeprefix("\n")
    return (reasoning if reasoning.strip() else ""), rest


def _calls_at_end(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The words before the first call, and the calls; all words, unless nothing but calls follows."""
    first = at = text.find(_CALL)
    calls = []
    while 0 <= at < len(text):
        if not text.startswith(_CALL, at):
            return text, ()
        try:
            value, end = _JSON.raw_decode(text, _blank(text, at + len(_CALL)))
        except (ValueError, RecursionError):
            return text, ()
        end = _blank(text, end)
        if not isinstance(value, dict) or not text.startswith(_CALLED, end):
            return text, ()
        calls.append(value)
        at = _blank(text, end + len(_CALLED))
    found = tuple(tool_call(call.get("name"), call.get("arguments")) for call in calls)
    return (text[:first].removesuffix("\n"), found) if found else (text, ())


def _blank(text: str, at: int) -> int:
    """The first place from `at` on that is not white."""
    found = _WHITE.match(text, at)
    return found.end() if found else at
