"""Blocks of a source → records. Enters: a block, in any process. Leaves: records and drops; what was found.

A block does not depend on the number of processes; all blocks in order are the source.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from microlm.core.records import Conversation, Preference
from microlm.text.read import Drop, Record
from microlm.text.sources.arithmetic import Problems
from microlm.text.sources.files import Texts, Unreadable
from microlm.text.sources.jsonl import Lines
from microlm.text.sources.shapes import KEYS, Shape, parse_object, shape_of
from microlm.text.sources.tables import Rows, Table

SAMPLE = 200
Block = Lines | Rows | Table | Texts | Unreadable | Problems
B = TypeVar("B", Lines, Rows, Table)


@dataclass(frozen=True, slots=True)
class Format:
    """The shapes of the first records of a source, the most frequent first."""

    shapes: tuple[tuple[Shape, int], ...]
    sampled: int

    @property
    def expected(self) -> str:
        """The key that most of the records have."""
        return KEYS[self.shapes[0][0]] if self.shapes else "text"

    def __str__(self) -> str:
        usable = sum(count for _, count in self.shapes)
        parts = [f"{shape} ({count} of {self.sampled} sampled)" for shape, count in self.shapes]
        if usable < self.sampled:
            parts.append(f"{self.sampled - usable} that cannot be used")
        return ", ".join(parts) or "no records"


def read_block(block: Block) -> Iterator[Record | Drop]:
    """The records and drops of a block, as reading the whole source gives them."""
    for place, data in block.objects():
        record = data if isinstance(data, Drop) else parse_object(data, place, block.expected)
        if block.task and isinstance(record, Conversation | Preference):
            record = replace(record, task=block.task)
        yield record


def format_of(objects: Iterable[tuple[str, dict[str, Any] | Drop]]) -> Format:
    """What the first 200 objects are."""
    found: Counter[Shape] = Counter()
    sampled = 0
    for place, data in itertools.islice(objects, SAMPLE):
        sampled += 1
        if not isinstance(data, Drop) and not isinstance(parse_object(data, place), Drop):
            found[shape_of(data)] += 1
    return Format(tuple(found.most_common()), sampled)


def expecting(blocks: Iterator[B]) -> Iterator[B]:
    """The blocks of one file, told the key that its first records have."""
    first = next(blocks, None)
    if first is not None:
        expected = format_of(first.objects()).expected
        for block in itertools.chain([first], blocks):
            yield replace(block, expected=expected)
