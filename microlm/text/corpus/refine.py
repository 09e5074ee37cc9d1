"""First pass, one block a time: raw records → cleaned records with digests, and what happened to them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microlm.core.records import Conversation, Document, Extraction
from microlm.text import sources
from microlm.text.clean import CleanRecipe, Effects, clean, glimpse, rules, tidied
from microlm.text.corpus.store import BlockWriter, finished
from microlm.text.dedup import record_digest
from microlm.text.read import Drop, Record
from microlm.text.sources import Block, Tally
from microlm.text.split import KINDS, kind_of, line_of

Schema = dict[str, dict[str, dict[str, str]]]
"""topic → relation → {head_type, tail_type}."""


@dataclass
class Report:
    """What happened in a block; reports add up."""

    read: Tally = field(default_factory=Tally)
    clean: Tally = field(default_factory=Tally)
    effects: Effects = field(default_factory=Effects)
    kinds: Counter[str] = field(default_factory=Counter)
    tasks: set[str] = field(default_factory=set)
    schema: Schema = field(default_factory=dict)

    def add(self, other: Report) -> None:
        """Put another block's report, which comes behind this one, to this."""
        self.read.add(other.read)
        self.clean.add(other.clean)
        self.effects.add(other.effects)
        self.kinds += other.kinds
        self.tasks |= other.tasks
        for topic, relations in other.schema.items():
            self.schema[topic] = relations | self.schema.get(topic, {})

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "read": self.read.to_json(),
            "clean": self.clean.to_json(),
            "effects": self.effects.to_json(),
            "kinds": dict(self.kinds),
            "tasks": sorted(self.tasks),
            "schema": self.schema,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """What `to_json` gave."""
        return cls(
            Tally.from_json(data["read"]),
            Tally.from_json(data["clean"]),
            Effects.from_json(data["effects"]),
            Counter(data["kinds"]),
            set(data["tasks"]),
            data["schema"],
        )


@dataclass(frozen=True)
class Task:
    """A block to refine: of a user's source, or composed records (they are trained on, never tested)."""

    folder: Path
    number: int
    block: Block | tuple[Record, ...]
    clean: CleanRecipe
    strict: bool = False
    word: str = ""

    def identity(self) -> list[Any]:
        """What tells this block from others that an earlier attempt may have refined under its number."""
        if isinstance(self.block, tuple):
            return ["composed", len(self.block)]
        return [
            self.word,
            self.block.consumed,
            getattr(self.block, "start", 0),
            getattr(self.block, "number", 0),
        ]


def refine(task: Task) -> dict[str, Any]:
    """Refine a block, unless an earlier attempt has; returns its report."""
    done = finished(task.folder, task.number)
    if done is not None and done["block"] == task.identity():
        found: dict[str, Any] = done["report"]
        return found
    report, composed = Report(), isinstance(task.block, tuple)
    writer = BlockWriter(task.folder, task.number)
    for record in _cleaned(_records(task, report), task.clean, report):
        _note(record, report)
        kind = kind_of(record)
        report.kinds[kind] += 1
        body, meta = serialised(record)
        chars = len(record.text) if isinstance(record, Document) else len(body)
        writer.put((KINDS.index(kind), int(composed)), record_digest(record), body, meta, chars)
    writer.finish({"block": task.identity(), "report": report.to_json()})
    return report.to_json()


def serialised(record: Record) -> tuple[bytes, bytes]:
    """(text, source and licence) of a document; (JSON line, nothing) of another record."""
    if not isinstance(record, Document):
        return line_of(record).encode("utf-8"), b""
    meta = json.dumps([record.source, record.licence], ensure_ascii=False, separators=(",", ":"))
    return record.text.encode("utf-8"), meta.encode("utf-8")


def document(body: bytes, meta: bytes) -> Document:
    """The document of `serialised`."""
    source, licence = json.loads(meta)
    return Document(body.decode("utf-8"), source, licence)


def _records(task: Task, report: Report) -> Iterator[Record]:
    """The records of the block; faults are counted, or, if strict, an error."""
    for record in task.block if isinstance(task.block, tuple) else sources.read_block(task.block):
        if not isinstance(record, Drop):
            report.read.keep()
            yield record
        elif task.strict:
            raise sources.strict_error(sources.parse(task.word), record)
        else:
            report.read.drop(record.reason, f"{record.place}: {record.detail}")


def _cleaned(records: Iterable[Record], recipe: CleanRecipe, report: Report) -> Iterator[Record]:
    steps = rules(recipe)
    for record in records:
        if isinstance(record, Document):
            after: Record
            after, reason = clean(record, steps, report.effects)
        else:
            after, reason = tidied(record)
        if reason:
            report.clean.drop(reason, glimpse(after) if isinstance(after, Document) else record.source)
            continue
        report.clean.keep()
        yield after


def _note(record: Record, report: Report) -> None:
    """What later steps want to know of the user's records: which tasks, which relations."""
    if isinstance(record, Conversation):
        report.tasks.add(record.task)
    elif isinstance(record, Extraction):
        report.tasks.add("extraction")
        for t in record.relation:
            types = {"head_type": t.head_type, "tail_type": t.tail_type}
            report.schema.setdefault(record.cate, {}).setdefault(t.relation, types)
