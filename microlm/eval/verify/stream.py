"""Streaming conformance. Enter: a request body and its whole answer; leaves: the first fault."""

from __future__ import annotations

import json
from typing import Any

from microlm.core import payload
from microlm.core.client import DONE, ChatReply, Client, Usage
from microlm.eval.verify.verdict import Failed


def check_stream(client: Client, body: dict[str, Any], whole: ChatReply) -> str:
    """Ids, roles, finish reason, usage, `[DONE]` and text of a streamed chat against the whole answer."""
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    events = [e.data for e in client.events("/v1/chat/completions", asked)]
    if not events or events[-1] != DONE:
        raise Failed("the stream does not end with 'data: [DONE]'")
    if DONE in events[:-1]:
        raise Failed("events come after 'data: [DONE]'")
    chunks = [_parse(data) for data in events[:-1]]
    _check_heads(chunks)
    choices = [c["choices"][0] for c in chunks if c["choices"]]
    _check_choices(choices)
    text = "".join(c["delta"].get("content") or "" for c in choices)
    if text != whole.text:
        raise Failed(f"the joined stream {text[:60]!r} is not the whole answer {whole.text[:60]!r}")
    if choices[-1]["finish_reason"] != whole.finish_reason:
        raise Failed(
            f"finish_reason {choices[-1]['finish_reason']!r}, without streaming {whole.finish_reason!r}"
        )
    _check_usage(chunks, whole)
    return f"{len(chunks)} chunks, then [DONE]; joined they are the whole answer"


def _parse(data: str) -> dict[str, Any]:
    """An event's object with the types that OpenAI gives it; what stands in it is looked at later."""
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        raise Failed(f"an event is not JSON: {data[:60]!r}") from None
    if not isinstance(chunk, dict):
        raise Failed(f"an event is not an object: {data[:60]!r}")
    try:
        for choice in payload.choices(chunk):
            if not isinstance(choice.get("delta"), dict):
                raise Failed(f"a choice has no delta: {data[:60]!r}")
            for holder, name in (
                (choice, "finish_reason"),
                (choice["delta"], "role"),
                (choice["delta"], "content"),
            ):
                payload.text(holder, name)
        for name in ("id", "object", "model"):
            payload.text(chunk, name)
        payload.counts(chunk)
    except payload.Malformed as e:
        raise Failed(f"an event is malformed: {e}") from None
    return chunk


def _check_heads(chunks: list[dict[str, Any]]) -> None:
    for name in ("id", "object", "created", "model"):
        values = {str(c.get(name)) for c in chunks}
        if len(values) != 1 or values == {"None"}:
            raise Failed(f"'{name}' is missing or changes within the stream: {', '.join(sorted(values)[:3])}")
    if chunks[0]["object"] != "chat.completion.chunk":
        raise Failed(f"object is {chunks[0]['object']!r}, expected 'chat.completion.chunk'")


def _check_choices(choices: list[dict[str, Any]]) -> None:
    if not choices or choices[0]["delta"].get("role") != "assistant":
        raise Failed("the first chunk does not carry the role 'assistant'")
    reasons = [c.get("finish_reason") for c in choices]
    if any(reasons[:-1]) or reasons[-1] not in ("stop", "length"):
        raise Failed(f"finish_reason must stand on the last chunk only; found {[r for r in reasons if r]}")


def _check_usage(chunks: list[dict[str, Any]], whole: ChatReply) -> None:
    told = [c for c in chunks if c.get("usage") is not None]
    if not told:
        raise Failed("no usage chunk, although stream_options.include_usage was asked for")
    if told[-1] is not chunks[-1] or told[-1]["choices"]:
        raise Failed("the usage must stand in the last chunk, beside empty choices")
    counts = payload.counts(told[-1])
    if counts is None or whole.usage is None or Usage(*counts) != whole.usage:
        raise Failed(f"usage {told[-1]['usage']}, without streaming {whole.raw.get('usage')}")
