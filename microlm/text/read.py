"""JSON lines → records. Enters: bytes of a line, or a file that we wrote. Leaves: a record, or a `Drop`.

`parse_line` is tolerant (raw corpora: every fault is a reason); `read_records` is strict (our own files).
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from microlm.core.errors import UserError
from microlm.core.records import ROLES, Conversation, Document, Extraction, Message, Preference, Role, Triple

Record = Document | Conversation | Extraction | Preference
T = TypeVar("T")
_ROLE_WORDS: Mapping[str, Role] = {**{r: r for r in ROLES}, "human": "user", "gpt": "assistant"}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Drop:
    """What was read and not kept: `reason` is counted, `place` is `file:line`, `detail` the sentence."""

    reason: str
    place: str
    detail: str


class Fault(Exception):
    """A line that cannot become a record; becomes a `Drop` where the line is known."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def parse_line(line: bytes, place: str, expected: str = "text") -> Record | Drop:
    """One line of a raw corpus → its record, of the shape that its keys say, or a drop.

    `expected` is the key that the file's other records have: a line without any known key is said to lack it.
    """
    try:
        return parse_object(parse_json(line), place, expected)
    except Fault as fault:
        return Drop(fault.reason, place, fault.detail)


def parse_json(line: bytes) -> dict[str, Any]:
    """A JSON object without lone surrogates, or a Fault."""
    if not line.strip():
        raise Fault("empty_line", "the line is empty")
    if b"\0" in line:
        raise Fault("nul_byte", "the line holds a NUL byte")
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise Fault("invalid_utf8", f"byte {e.start} of the line is not UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise Fault("invalid_json", f"the line is not valid JSON ({_first_words(e)})") from None
    if not isinstance(value, dict):
        raise Fault("not_an_object", f"expected a JSON object, found {type(value).__name__}")
    # only an escape can bring one in, so most lines need no walk
    return check_strings(value) if b"\\ud" in line or b"\\uD" in line else value


def check_strings(value: dict[str, Any]) -> dict[str, Any]:
    """The same object, or a Fault when a string in it cannot be written as UTF-8."""
    if _has_surrogate(value):
        raise Fault("lone_surrogate", "a string holds half a surrogate pair (\\ud800…\\udfff)")
    return value


def parse_object(data: Mapping[str, Any], place: str, expected: str = "text") -> Record:
    """A JSON object → Document, Conversation, Extraction or Preference by its keys; raises Fault."""
    origin = data.get("source")
    source = origin if isinstance(origin, str) and origin else place
    licence = next((v for v in (data.get("licence"), data.get("license")) if isinstance(v, str)), "")
    if "chosen" in data or "rejected" in data:
        return _preference(data, source, licence)
    if "messages" in data or "conversations" in data:
        messages = _messages(data.get("messages", data.get("conversations")))
        if messages[-1].role != "assistant":
            raise Fault("no_answer", "the conversation does not end with an answer of the assistant")
        return Conversation(messages, _word(data.get("task")) or "chat", source, licence)
    if "instruction" in data:
        return _alpaca(data, source, licence)
    if "text" in data and "relation" in data:
        return _extraction(data, place, source, licence)
    return Document(_text(data, "text", expected), source, licence)


def main_key(record: Record) -> str:
    """The key that a record of this shape must have (for the message about a file whose field is renamed)."""
    if isinstance(record, Conversation):
        return "messages"
    return "chosen" if isinstance(record, Preference) else "text"


def _text(data: Mapping[str, Any], key: str, expected: str | None = None) -> str:
    if key not in data:
        found = ", ".join(_shown(k) for k in list(data)[:5]) or "no keys"
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


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise Fault("bad_messages", "'messages' must be a list of at least one {role, content}")
    return tuple(_message(turn) for turn in value)


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Fault(
            "bad_messages", f"a message is {type(turn).__name__}, expected an object {{role, content}}"
        )
    word = turn.get("role", turn.get("from"))
    role = _ROLE_WORDS.get(word) if isinstance(word, str) else None
    if role is None:
        raise Fault("bad_role", f"role '{_shown(word)}' is not one of {', '.join(ROLES)}")
    return Message(role, _text(turn, "value" if "value" in turn and "content" not in turn else "content"))


def _alpaca(data: Mapping[str, Any], source: str, licence: str) -> Conversation:
    extra = data.get("input") or ""
    if not isinstance(extra, str):
        raise Fault("input_not_a_string", f"'input' is {type(extra).__name__}, expected a string")
    question = "\n".join(part for part in (_text(data, "instruction"), extra) if part.strip())
    messages = (Message("user", question), Message("assistant", _text(data, "output")))
    return Conversation(messages, _word(data.get("task")) or "chat", source, licence)


def _preference(data: Mapping[str, Any], source: str, licence: str) -> Preference:
    value = data.get("prompt", data.get("messages", data.get("conversations")))
    if value is None:
        raise Fault(
            "missing_field:prompt",
            "a preference needs 'prompt' or 'conversations' beside chosen and rejected",
        )
    prompt = (Message("user", _text(data, "prompt")),) if isinstance(value, str) else _messages(value)
    return Preference(prompt, _answer(data, "chosen"), _answer(data, "rejected"), source, licence)


def _answer(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    return _messages(value)[-1].content if isinstance(value, list) else _text(data, key)


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
        text=_text(data, "text"),
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
    head, relation, tail = (_text(value, key) for key in ("head", "relation", "tail"))
    return Triple(head, relation, tail, _word(value.get("head_type")), _word(value.get("tail_type")))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _shown(value: Any) -> str:
    """A word of the user's, short and printable, for a message."""
    text = value if isinstance(value, str) else type(value).__name__
    return (
        text[:24].encode("ascii" if not text.isprintable() else "utf-8", "backslashreplace").decode("utf-8")
    )


def _first_words(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(_has_surrogate(k) or _has_surrogate(v) for k, v in value.items())
    return isinstance(value, list) and any(_has_surrogate(v) for v in value)


def read_records(path: str | Path, kind: type[T]) -> Iterator[T]:
    """The records of a JSONL file that a stage wrote; any fault is a UserError `file:line: …`."""
    build: Callable[[Any], T] = _builder(kind)  # type: ignore[arg-type]
    try:
        with Path(path).open("rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    yield build(parse_json(line))
                except Fault as fault:
                    raise UserError(f"{path}:{number}: {fault.detail}; make the file again") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the stage that writes it has not finished") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, expected a JSONL file") from None


@cache
def _builder(kind: Any) -> Callable[[Any], Any]:
    """A strict function from a JSON value to `kind`: a frozen record, tuple, Literal, or plain type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record_builder(kind)
    if origin is tuple:
        item = _builder(args[0])
        return lambda value: tuple(item(v) for v in _require(value, list))
    if origin is Literal:
        return lambda value: _choice(value, args)
    if origin in (typing.Union, types.UnionType):
        inner = _builder(next(a for a in args if a is not type(None)))
        return lambda value: None if value is None else inner(value)
    plain = origin or kind
    return lambda value: _require(value, plain)


def _record_builder(kind: Any) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(kind)
    builders = {f.name: _builder(hints[f.name]) for f in dataclasses.fields(kind)}
    missing = dataclasses.MISSING
    needed = [
        f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing
    ]

    def build(value: Any) -> Any:
        data = _require(value, dict)
        for name in needed:
            if name not in data:
                raise Fault("missing_field", f"key '{name}' is missing")
        for name in data:
            if name not in builders:
                raise Fault("unknown_field", f"unknown key '{_shown(name)}' in a {kind.__name__}")
        return kind(**{name: builders[name](v) for name, v in data.items()})

    return build


def _choice(value: Any, choices: Iterable[Any]) -> Any:
    if value not in tuple(choices):
        raise Fault("bad_value", f"'{_shown(value)}' is not one of {', '.join(map(str, choices))}")
    return value


def _require(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
        raise Fault("bad_value", f"expected {kind.__name__}, found {type(value).__name__}")
    return value
