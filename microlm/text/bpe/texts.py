"""What a tokenizer is trained on, in blocks that any process can read again and again.

Enters: a data artifact, or words of sources. Leaves: blocks; each gives texts and counts what it drops.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Document
from microlm.text import sources
from microlm.text.chat.chatml import ChatML
from microlm.text.read import Drop, Fault, Record, builder, parse_json, texts_of
from microlm.text.sources import Tally, read_block
from microlm.text.sources.files import Texts
from microlm.text.sources.jsonl import Lines, read_lines
from microlm.text.tokenizer import MARKS, SPECIAL

TRAINING = (("documents/train.jsonl", Document), ("conversations/train.jsonl", Conversation))
"""The files of a data artifact that are trained on."""
_SOME_CHARS = 1 << 20
_CONTROL = re.compile("|".join(map(re.escape, (*SPECIAL, *MARKS))))


@dataclass(frozen=True)
class RecordBlock:
    """Lines of a file that a stage wrote, the first `limit` of them; a fault is a UserError."""

    path: Path
    lines: Lines
    kind: Any
    limit: int | None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.lines.consumed

    @property
    def held(self) -> int:
        """Nothing: it is read from the file."""
        return 0

    def texts(self, tally: Tally) -> Iterator[list[str]]:
        """What the records say, some texts at a time."""
        build = builder(self.kind)
        with self.path.open("rb") as file:
            file.seek(self.lines.start)
            lines = file.read(self.lines.size).split(b"\n")
        found: list[Record] = []
        for number, line in enumerate(lines[: self.limit], self.lines.number):
            if number == self.lines.number + len(lines) - 1 and not line:
                break  # behind the last line end
            try:
                found.append(build(parse_json(line)))
            except Fault as fault:
                raise UserError(f"{self.path}:{number}: {fault.detail}; make the file again") from None
            tally.keep()
        if self.lines.fault:
            raise UserError(f"{self.lines.fault.place}: {self.lines.fault.detail}; make the file again")
        yield from _some(text for record in found for text in said(record))


@dataclass(frozen=True)
class SourceBlock:
    """A block of a user's source, its first `limit` records; what cannot be read is dropped and counted."""

    block: sources.Block
    limit: int | None

    @property
    def size(self) -> int:
        """Bytes of the source."""
        return self.block.consumed

    @property
    def held(self) -> int:
        """Bytes that wait in memory, as what is unpacked or a table does."""
        is_file = isinstance(self.block, Texts)
        if is_file or (isinstance(self.block, Lines) and self.block.data is None):
            return 0
        return self.block.consumed

    def texts(self, tally: Tally) -> Iterator[list[str]]:
        """What the records say, some texts at a time."""
        yield from _some(text for record in self._records(tally) for text in said(record))

    def _records(self, tally: Tally) -> Iterator[Record]:
        kept = 0
        for record in read_block(self.block):
            if kept == self.limit:
                return
            if isinstance(record, Drop):
                tally.drop(record.reason, f"{record.place}: {record.detail}")
                continue
            kept += 1
            tally.keep(record.licence)
            yield record


@dataclass(frozen=True)
class DataTexts:
    """The training documents and conversations of a data artifact, `limit` of each at most."""

    folder: Path
    limit: int | None

    def __iter__(self) -> Iterator[RecordBlock]:
        for name, kind in TRAINING:
            path = self.folder / name
            if not path.exists() or not path.stat().st_size:
                continue
            for lines in read_lines(path, name):
                left = None if self.limit is None else self.limit - lines.number + 1
                if left is not None and left <= 0:
                    break
                yield RecordBlock(path, lines, kind, left)


@dataclass(frozen=True)
class SourceTexts:
    """The records of sources in the order of their words, `limit` of all at most."""

    words: tuple[str, ...]
    limit: int | None

    def __iter__(self) -> Iterator[SourceBlock]:
        left = self.limit
        for block in itertools.chain.from_iterable(map(sources.blocks, self.parsed())):
            yield SourceBlock(block, left)
            if left is not None:
                left -= sum(not isinstance(record, Drop) for record in read_block(block))
                if left <= 0:
                    return

    def parsed(self) -> list[sources.Source]:
        """The sources; what has no texts of its own is a UserError."""
        found = [sources.parse(word) for word in sorted(self.words)]
        if any(source.kind == sources.FACTBOOK for source in found):
            raise UserError(
                "tokenizer.source factbook: is composed by the stage data; make a data artifact, and set data"
            )
        return found


def said(record: Record) -> Iterable[str]:
    """What stands between control tokens when the record is encoded."""
    if not isinstance(record, Conversation):
        return texts_of(record)
    return (text for text in _CONTROL.split(ChatML().render(record)) if text.strip("\n"))


def _some(texts: Iterable[str]) -> Iterator[list[str]]:
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= _SOME_CHARS:
            yield some
            some, size = [], 0
    if some:
        yield some
