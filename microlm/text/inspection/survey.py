"""A block of a part, looked at by a worker. Enters: a block of raw lines. Leaves: its counts and findings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from microlm.core.records import Conversation, Document, Extraction
from microlm.text.inspection import masks, overlap
from microlm.text.inspection.parts import QUESTIONS, Part
from microlm.text.read import Drop, Record, texts_of
from microlm.text.rules.language import language_of
from microlm.text.sources import Block
from microlm.text.sources.shapes import parse_object

MAX_NAMES = 200
LANGUAGE_CHARS = 3000


@dataclass
class Group:
    """Counts of one part; those of its blocks add up."""

    objects: int = 0
    records: int = 0
    chars: int = 0
    tokens: int = 0
    answers: int = 0
    cut: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    token_lengths: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    topics: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    mask_faults: Counter[str] = field(default_factory=Counter)

    def add(self, other: Group) -> None:
        """Put another group's counts to these."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, Counter):
                for name, count in theirs.items():
                    bounded(mine, name, count)
            else:
                setattr(self, f.name, mine + theirs)


@dataclass
class Findings:
    """What a block came to. Examples are names of records, a few for each of the gates."""

    part: Part
    number: int
    consumed: int
    group: Group = field(default_factory=Group)
    examples: dict[str, list[str]] = field(default_factory=dict)
    near: list[overlap.Near] = field(default_factory=list)

    def example(self, gate: str, name: str) -> None:
        """Show a record, if there are few yet."""
        shown = self.examples.setdefault(gate, [])
        if len(shown) < overlap.MAX_EXAMPLES:
            shown.append(name)


@dataclass(frozen=True)
class Options:
    """How an audit looks; `near` is the Jaccard from which records are alike, 0 for not looking."""

    folder: Path
    context: int
    tokenizer: Path | None
    near: float


@dataclass(frozen=True)
class Task:
    """A block to look at, and the held-out blocks of other splits before it."""

    options: Options
    part: Part
    number: int
    block: Block
    held_out: tuple[int, ...]
    index: bool
    """Whether later blocks are compared with this one."""


def survey(task: Task) -> Findings:
    """Count a block; leave its digests, and if held out its texts, in the folder."""
    found, options = Findings(task.part, task.number, task.block.consumed), task.options
    records, names = [], []
    for place, record in _records(task, found):
        source = "" if record.source == place else f" ({record.source[:120]})"
        names.append(f"{task.part.label(place)}{source}")
        records.append(record)
        _observe(found, record, names[-1])
    said = overlap.write(options.folder, task.number, task.part, records, names)
    if options.near and records and (task.index or task.held_out):
        signed = overlap.sign(records, said, options.near)
        found.near = list(overlap.alike(options.folder, signed, task.held_out, options.near))
        if task.index:
            overlap.keep(options.folder, task.number, signed)
    if options.tokenizer:
        _look_at_masks(found, options.tokenizer, options.context, records, names)
    return found


def _records(task: Task, found: Findings) -> Iterator[tuple[str, Record]]:
    """The block's records with their places; keys of all objects are counted, faults by reason."""
    expected = task.block.expected
    for place, data in task.block.objects():
        record: Record | Drop = data if isinstance(data, Drop) else parse(task.part, expected, data, place)
        if not isinstance(data, Drop):
            found.group.objects += 1
            for key in data:
                bounded(found.group.keys, key[:80])
        if isinstance(record, Drop):
            bounded(found.group.unreadable, record.reason)
            found.example("unreadable", f"{task.part.label(record.place)}: {record.detail}")
        else:
            yield place, record


def parse(part: Part, expected: str, data: Mapping[str, Any], place: str) -> Record | Drop:
    """An object of a part → its record, or a drop; a question is a document of one line."""
    if part.kind == QUESTIONS and isinstance(question := data.get("question"), str):
        return Document(question, place)
    return parse_object(data, place, expected)


def _observe(found: Findings, record: Record, name: str) -> None:
    group, text = found.group, "\n".join(texts_of(record))
    group.records += 1
    group.chars += len(text)
    group.lengths[len(text).bit_length()] += 1
    bounded(group.languages, language_of(text[:LANGUAGE_CHARS]) or "open")
    bounded(group.sources, re.split("[:#]", record.source, maxsplit=1)[0][:200] or "unknown")
    if found.part.kind != QUESTIONS:  # they state none, they belong to the data
        bounded(group.licences, record.licence[:200] or "unknown")
    if isinstance(record, Extraction):
        bounded(group.topics, record.cate or "none")
    elif isinstance(record, Conversation):
        bounded(group.tasks, record.task)


def _look_at_masks(
    found: Findings, tokenizer: Path, context: int, records: list[Record], names: list[str]
) -> None:
    for seen in masks.look(tokenizer, context, records):
        group = found.group
        group.tokens += seen.tokens
        group.token_lengths[seen.tokens.bit_length()] += 1
        group.answers += seen.answers
        group.cut += seen.cut
        if seen.cut:
            found.example("eos_cut", f"{names[seen.record]}: {seen.tokens:,} tokens")
        if seen.fault:
            group.mask_faults[seen.fault] += 1
            found.example("mask_errors", f"{names[seen.record]}: {seen.fault}")


def bounded(counter: Counter[Any], name: Any, count: int = 1) -> None:
    """Count a name; after 200 the new ones are `other`."""
    counter[name if name in counter or len(counter) < MAX_NAMES or isinstance(name, int) else "other"] += (
        count
    )
