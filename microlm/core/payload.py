"""What goes to an endpoint and comes back. Conversations → JSON; bytes and JSON → events, texts, counts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from microlm.core.errors import UserError
from microlm.core.records import Constraint, Message, Sampling

COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
MAX_COUNT = 2**63
_NEUTRAL = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip
MAX_EVENT_BYTES = 8 << 20  # an endpoint that never ends an event is not worth our memory


class Malformed(Exception):
    """A value is not what OpenAI's protocol puts there; the sentence names it."""


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event's data, `[DONE]` included."""

    data: str
    received_s: float


def chat_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as OpenAI's protocol writes them; calls are numbered, and their results in the same order."""
    turns = []
    called = answered = 0
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            turn["reasoning_content"] = message.reasoning
        if message.tool_calls:
            functions = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
            turn["tool_calls"] = [
                {"id": f"call_{called + i}", "type": "function", "function": function}
                for i, function in enumerate(functions)
            ]
            called += len(functions)
        if message.role == "tool":
            turn["tool_call_id"] = f"call_{answered}"
            answered += 1
        turns.append(turn)
    return turns


def tool_fields(tools: Sequence[str]) -> dict[str, Any]:
    """The fields of a request that shows tools; calls in the answer are to stay text."""
    return {"tools": [json.loads(tool) for tool in tools], "tool_choice": "none"} if tools else {}


def wire(sampling: Sampling) -> dict[str, Any]:
    """`Sampling` as fields of an OpenAI request; what stands at its neutral value is not sent."""
    body: dict[str, Any] = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
    for name, neutral in _NEUTRAL.items():
        if (value := getattr(sampling, name)) != neutral:
            body[name] = value
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if sampling.constraint is not None:
        body |= _constraint(sampling.constraint)
    return body


def _constraint(constraint: Constraint) -> dict[str, Any]:
    """A constraint as OpenAI's `response_format`, or as vLLM's `structured_outputs`; `copy_from` is ours."""
    kind, value = constraint.kind, constraint.value
    body: dict[str, Any] = {}
    if kind == "json_schema":
        schema = {"name": "answer", "schema": json.loads(value), "strict": True}
        body["response_format"] = {"type": kind, "json_schema": schema}
    elif kind == "json_object":
        body["response_format"] = {"type": kind}
    elif kind != "copy":
        body["structured_outputs"] = {kind: json.loads(value) if kind == "choice" else value}
    if constraint.copy_from is not None:
        body["copy_from"] = constraint.copy_from
    if constraint.copy_words:
        body["copy_words"] = True
    return body


def constraint_of(
    *,
    json_schema: str | None = None,
    json_object: bool = False,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
    copy_from: str | None = None,
    copy_words: bool = False,
) -> Constraint | None:
    """The one constraint that is given, None where there is none; two are an error."""
    given = {
        "json_schema": json_schema,
        "json_object": "" if json_object else None,
        "regex": regex,
        "choice": json.dumps(choice, ensure_ascii=False) if choice else None,
        "grammar": grammar,
    }
    found: list[Constraint] = [
        Constraint(kind, value, copy_from, copy_words)  # type: ignore[arg-type]
        for kind, value in given.items()
        if value is not None
    ]
    if len(found) > 1:
        names = ", ".join(c.kind for c in found)
        raise UserError(f"constraint: {names} are given; only one of them can bound an answer")
    if copy_words and copy_from is None:
        raise UserError("copy_words: says how to copy, and copy_from is not there; give both")
    if not found and copy_from is not None:
        return Constraint("copy", copy_from=copy_from, copy_words=copy_words)
    return found[0] if found else None


def member(holder: dict[str, Any], name: str) -> dict[str, Any]:
    """An object inside another; empty when it is missing or null."""
    value = holder.get(name)
    if value is not None and not isinstance(value, dict):
        raise Malformed(f"'{name}' is {_shown(value)}, expected an object")
    return value or {}


def text(holder: dict[str, Any], name: str) -> str | None:
    """A text; None when it is missing or null."""
    value = holder.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise Malformed(f"'{name}' is {_shown(value)}, expected a text")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise Malformed(f"'{name}' holds a lone surrogate, which is half a character: {_shown(value)}")
    return value


def choices(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of an answer, or of an event of a stream; the last event has none."""
    value = data.get("choices")
    if not isinstance(value, list) or not all(isinstance(c, dict) for c in value):
        raise Malformed(f"'choices' is {_shown(value)}, expected a list of objects")
    return value


def counts(data: dict[str, Any]) -> tuple[int, int, int] | None:
    """Prompt, completion and total tokens of `usage`; None when one of them is missing or null."""
    usage = member(data, "usage")
    values = [usage.get(name) for name in COUNTS]
    for name, value in zip(COUNTS, values, strict=True):
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT
        if value is not None and not whole:
            raise Malformed(f"'usage.{name}' is {_shown(value)}, expected a count")
    prompt, completion, total = values
    return None if prompt is None or completion is None or total is None else (prompt, completion, total)


def split_events(chunks: Iterable[bytes]) -> Iterator[Event]:
    """Bytes → server-sent events (LF or CRLF lines), each with the time at which its last bytes came."""
    buffer = b""
    data: list[str] = []
    held = 0  # bytes of the lines in `data`
    now = 0.0
    for chunk in chunks:
        now = time.perf_counter()
        buffer += chunk
        if len(buffer) + held > MAX_EVENT_BYTES:
            raise UserError(
                f"an event of the stream is longer than {MAX_EVENT_BYTES} bytes; this server misbehaves"
            )
        *lines, buffer = buffer.replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
                held += len(line)
            elif not line and data:
                yield Event("\n".join(data), now)
                data, held = [], 0
    if data:
        yield Event("\n".join(data), now)


def _shown(value: Any) -> str:
    return ascii(value)[:60]
