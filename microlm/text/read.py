"""JSON lines → records. Enters: bytes of a line, or a file that we wrote. Leaves: an object, or a record.

`read_records` is strict, for our own files; raw corpora, whose faults are counted, are read by `sources`.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Document, Extraction, Preference, words_of
from microlm.text.rules.privacy import masked

Record = Document | Conversation | Extraction | Preference
T = TypeVar("T")
MASKED_CHARS = 1024  # of a word: what is a person's is whole in it where it begins in the part that is shown
_SURROGATE = re.compile("[\ud800-\udfff]")


def texts_of(record: Record) -> tuple[str, ...]:
    """All that a record says, part by part."""
    if isinstance(record, Document | Extraction):
        return (record.text,)
    if isinstance(record, Conversation):
        return (*record.tools, *(word for m in record.messages for word in words_of(m)))
    prompt = (word for m in record.prompt for word in words_of(m))
    return (*record.tools, *prompt, record.chosen, record.rejected)


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


def parse_json(line: bytes) -> dict[str, Any]:
    """A JSON object without lone surrogates, or a Fault."""
    if not line.strip():
        raise Fault("empty_line", "the line is empty")
    if b"\0" in line:
        raise Fault("nul_byte", "the line holds a NUL byte")
    try:
        value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
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


def shown(value: Any) -> str:
    """A word of the user, short, printable and without what is a person's, for a message."""
    text = masked(value[:MASKED_CHARS]) if isinstance(value, str) else type(value).__name__
    return (
        text[:24].encode("ascii" if not text.isprintable() else "utf-8", "backslashreplace").decode("utf-8")
    )


def _first_words(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]


def _has_surrogate(value: Any) -> bool:
    waiting = [value]  # no recursion: JSON may be nested deeper than Python calls
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if _SURROGATE.search(value):
                return True
        elif isinstance(value, dict):
            waiting += value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def read_records(path: str | Path, kind: type[T]) -> Iterator[T]:
    """The records of a JSONL file that a stage wrote; any fault is a UserError `file:line: …`."""
    build: Callable[[Any], T] = builder(kind)  # type: ignore[arg-type]
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
def builder(kind: Any) -> Callable[[Any], Any]:
    """A strict function from a JSON value to `kind`: a frozen record, tuple, Literal, or plain type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _recordbuilder(kind)
    if origin is tuple:
        item = builder(args[0])
        return lambda value: tuple(item(v) for v in _require(value, list))
    if origin is Literal:
        return lambda value: _choice(value, args)
    if origin in (typing.Union, types.UnionType):
        inner = builder(next(a for a in args if a is not type(None)))
        return lambda value: None if value is None else inner(value)
    plain = origin or kind
    return lambda value: _require(value, plain)


def _recordbuilder(kind: Any) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(kind)
    builders = {f.name: builder(hints[f.name]) for f in dataclasses.fields(kind)}
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
                raise Fault("unknown_field", f"unknown key '{shown(name)}' in a {kind.__name__}")
        return kind(**{name: builders[name](v) for name, v in data.items()})

    return build


def _choice(value: Any, choices: Iterable[Any]) -> Any:
    if value not in tuple(choices):
        raise Fault("bad_value", f"'{shown(value)}' is not one of {', '.join(map(str, choices))}")
    return value


def _require(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
        raise Fault("bad_value", f"expected {kind.__name__}, found {type(value).__name__}")
    return value
