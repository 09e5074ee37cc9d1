"""The shapes that people's records have → our records. Enters: JSON objects or rows of a table.

Leaves: a Document, Conversation, Extraction or Preference, or a drop; every fault is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from microlm.core.records import (
    Conversation,
    Document,
    Extraction,
    Preference,
    Triple,
)
from microlm.text.read import Drop, Fault, Record, parse_json
from microlm.text.sources.marked import answer_text, parsed
from microlm.text.sources.turns import dialogue, field, parse_chatml

Shape = Literal[
    "documents",
    "ChatML text",
    "OpenAI messages",
    "ShareGPT conversations",
    "minimind conversations",
    "Alpaca instructions",
    "preference pairs",
    "extraction records",
]
KEYS: Mapping[Shape, str] = {
    "documents": "text",
    "ChatML text": "text",
    "OpenAI messages": "messages",
    "ShareGPT conversations": "conversations",
    "minimind conversations": "conversations",
    "Alpaca instructions": "instruction",
    "preference pairs": "chosen",
    "extraction records": "relation",
}
"""The key that tells a shape; `ChatML text` is told by how its text begins."""
KNOWN = frozenset({"text", "instruction", "messages", "conversations", "chosen", "rejected"})
"""What an object must have one of."""
_CHATML = re.compile(r"\s*<\|im_start\|>[a-z_]+\n")
_MARKERS = re.compile(r"\s*<\|im_(?:start|end)\|>\s*")


def parse_line(line: bytes, place: str, expected: str = "text") -> Record | Drop:
    """One line of a raw corpus → its record, of the shape that its keys say, or a drop."""
    try:
        data = parse_json(line)
    except Fault as fault:
        return Drop(fault.reason, place, fault.detail)
    return parse_object(data, place, expected)


def parse_object(data: Mapping[str, Any], place: str, expected: str = "text") -> Record | Drop:
    """A JSON object → its record, of the shape that its keys say, or a drop.

    `expected` is the key that the file's first records have: an object without a known key lacks that one.
    """
    try:
        return _build(data, place, expected)
    except Fault as fault:
        return Drop(fault.reason, place, fault.detail)
    except RecursionError:
        return Drop("invalid_json", place, "the object is nested too deeply")


def shape_of(data: Mapping[str, Any]) -> Shape:
    """What the keys of an object say that it is; keys whose value is null count when no other is known."""
    for keys in ({k for k, v in data.items() if v is not None}, data.keys()):
        if "chosen" in keys or "rejected" in keys:
            return "preference pairs"
        if "messages" in keys or "conversations" in keys:
            return _dialogue_shape(data)
        if "instruction" in keys:
            return "Alpaca instructions"
        if "text" in keys:
            text = data["text"]
            chat = isinstance(text, str) and _CHATML.match(text)
            return "extraction records" if "relation" in keys else "ChatML text" if chat else "documents"
    return "documents"


def _dialogue_shape(data: Mapping[str, Any]) -> Shape:
    turns = parsed(_turns(data))
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
        return "ShareGPT conversations"
    return "minimind conversations" if data.get("messages") is None else "OpenAI messages"


def _turns(data: Mapping[str, Any]) -> Any:
    return data.get("conversations") if data.get("messages") is None else data["messages"]


def _build(data: Mapping[str, Any], place: str, expected: str) -> Record:
    shape = shape_of(data)
    origin = data.get("source")
    source = origin if isinstance(origin, str) and origin else place
    licence = next((v for v in (data.get("licence"), data.get("license")) if isinstance(v, str)), "")
    if shape == "documents":
        return Document(_without_markers(field(data, "text", expected)), source, licence)
    if shape == "extraction records":
        return _extraction(data, place, source, licence)
    if shape == "preference pairs":
        return _preference(data, source, licence)
    if shape == "Alpaca instructions":
        turns: Any = _alpaca(data)
    else:
        turns = parse_chatml(data["text"]) if shape == "ChatML text" else _turns(data)
    messages, tools = dialogue(turns, data)
    if messages[-1].role != "assistant":
        raise Fault("no_answer", "the conversation does not end with an answer of the assistant")
    return Conversation(messages, _word(data.get("task")) or "chat", source, licence, tools)


def _without_markers(text: str) -> str:
    """Raw text, also where it stands between markers that name no role (minimind's pretraining files)."""
    if not text.startswith("<|im_start|>"):
        return text
    return "\n".join(part for part in _MARKERS.split(text) if part)


def _alpaca(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Earlier turns of `history` (pairs of question and answer), then instruction, input and output."""
    extra = data.get("input") or ""
    if not isinstance(extra, str):
        raise Fault("input_not_a_string", f"'input' is {type(extra).__name__}, expected a string")
    history = parsed(data.get("history")) or []
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise Fault("bad_history", "'history' must be a list of pairs [question, answer]")
    question = "\n".join(part for part in (field(data, "instruction"), extra) if part.strip())
    words = [word for pair in history for word in pair] + [question, field(data, "output")]
    return [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]


def _preference(data: Mapping[str, Any], source: str, licence: str) -> Preference:
    """The prompt stands apart, or both answers are whole conversations that differ in the last turn."""
    value = _listed(data.get("prompt") if data.get("prompt") is not None else _turns(data))
    chosen, rejected = (_answer(data, key) for key in ("chosen", "rejected"))
    if value is None:
        if len(chosen) < 2 or len(rejected) < 2:
            raise Fault(
                "missing_field:prompt",
                "a preference needs 'prompt' or 'conversations' beside chosen and rejected",
            )
        if chosen[:-1] != rejected[:-1]:
            raise Fault("prompts_differ", "chosen and rejected differ before their last turn")
        value = chosen[:-1]
    prompt, tools = dialogue([{"role": "user", "content": value}] if isinstance(value, str) else value, data)
    if prompt[-1].role == "assistant":
        raise Fault("no_question", "the prompt of the preference ends with an answer of the assistant")
    better, worse = _said(chosen), _said(rejected)
    if better == worse:
        raise Fault("equal_answers", "chosen and rejected are the same answer: nothing is preferred")
    task = _word(data.get("task")) or "chat"
    return Preference(prompt, better, worse, source, licence, tools, task)


def _listed(value: Any) -> Any:
    """Turns that a table holds as a JSON text; an answer that is JSON itself stays a text."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    turns = parsed(value)
    told = isinstance(turns, list) and all(isinstance(t, dict) and t.keys() & {"role", "from"} for t in turns)
    return turns if told else value


def _answer(data: Mapping[str, Any], key: str) -> list[Any]:
    """The turns of one side of a preference: one answer, or a whole conversation."""
    value = _listed(data.get(key))
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list) and value:
        return value
    return [{"role": "assistant", "content": field(data, key)}]


def _said(turns: list[Any]) -> str:
    """The text of an answer, its thinking and its calls between marks."""
    [last], _ = dialogue(turns[-1:], {})
    if last.role != "assistant":
        raise Fault("no_answer", "chosen and rejected must end with an answer of the assistant")
    return answer_text(last)


def _extraction(data: Mapping[str, Any], place: str, source: str, licence: str) -> Extraction:
    relation = data["relation"]
    if not isinstance(relation, list):
        raise Fault("bad_relation", f"'relation' is {type(relation).__name__}, expected a list of triples")
    allowed = data.get("allowed") or []
    if not isinstance(allowed, list) or not all(isinstance(a, str) for a in allowed):
        raise Fault("bad_relation", "'allowed' must be a list of relation names")
    return Extraction(
        id=str(data.get("id") or place),
        cate=_word(data.get("cate")),
        text=field(data, "text"),
        relation=tuple(_triple(t) for t in relation),
        allowed=tuple(allowed),
        kind=_word(data.get("kind")),
        lang=_word(data.get("lang")) or "zh",
        source=source,
        licence=licence,
    )


def _triple(value: Any) -> Triple:
    if not isinstance(value, dict):
        raise Fault("bad_relation", f"a triple is {type(value).__name__}, expected {{head, relation, tail}}")
    head, relation, tail = (field(value, key) for key in ("head", "relation", "tail"))
    return Triple(head, relation, tail, _word(value.get("head_type")), _word(value.get("tail_type")))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""
