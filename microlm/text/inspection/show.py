"""Some records of a part, drawn by seed. Enters: a part. Leaves: (place, record), and how many were read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from microlm.core import runtime
from microlm.core.metrics import Progress
from microlm.core.records import Conversation, Extraction, Message, Preference
from microlm.text import sources
from microlm.text.inspection.parts import Part
from microlm.text.inspection.survey import parse
from microlm.text.read import Drop, Record
from microlm.text.sources.marked import answer_text

Turn = tuple[str, str]


@dataclass
class Sample:
    """The drawn records in the order of the file; how many matched, lines that cannot be read, all tasks."""

    records: list[tuple[str, Record]] = field(default_factory=list)
    matched: int = 0
    unreadable: int = 0
    tasks: set[str] = field(default_factory=set)


def draw(part: Part, count: int, seed: int, contains: str | None, task: str | None = None) -> Sample:
    """`count` records with equal chances of all that contain a text and are of a task.

    The same for the same file and seed.
    """
    rng, sample = runtime.rng(seed, "show"), Sample()
    held: list[tuple[int, str, Record]] = []
    with Progress(f"data {part.name}", part.source.size_bytes(), "bytes") as bar:
        for block in sources.blocks(part.source):
            for place, data in block.objects():
                record = data if isinstance(data, Drop) else parse(part, block.expected, data, place)
                if isinstance(record, Drop):
                    sample.unreadable += 1
                    continue
                if isinstance(record, Conversation):
                    sample.tasks.add(record.task)
                if _is_wanted(record, contains, task):
                    sample.matched += 1
                    if len(held) < count:
                        held.append((sample.matched, place, record))
                    elif (at := rng.randrange(sample.matched)) < count:
                        held[at] = sample.matched, place, record
            bar.update(block.consumed)
    sample.records = [(part.label(place), record) for _, place, record in sorted(held, key=lambda h: h[0])]
    return sample


def _is_wanted(record: Record, contains: str | None, task: str | None) -> bool:
    if task is not None and not (isinstance(record, Conversation) and record.task == task):
        return False
    return contains is None or any(contains in text for _, text in turns(record))


def turns(record: Record) -> Iterator[Turn]:
    """What a record says, by who says it."""
    if isinstance(record, Conversation):
        yield from _chat(record.tools, record.messages)
    elif isinstance(record, Extraction):
        yield "text", record.text
        yield from (("relation", f"{t.head} · {t.relation} · {t.tail}") for t in record.relation)
    elif isinstance(record, Preference):
        yield from _chat(record.tools, record.prompt)
        yield "chosen", record.chosen
        yield "rejected", record.rejected
    else:
        yield "text", record.text


def _chat(tools: Sequence[str], messages: Sequence[Message]) -> Iterator[Turn]:
    yield from (("tools", tool) for tool in tools)
    yield from ((m.role, answer_text(m) if m.role == "assistant" else m.content) for m in messages)


def head(record: Record) -> str:
    """What a record is: task or topic, source, licence."""
    if isinstance(record, Conversation):
        first = f"task {record.task}"
    else:
        first = f"topic {record.cate}" if isinstance(record, Extraction) and record.cate else ""
    words = (
        first,
        record.source and f"source {record.source}",
        record.licence and f"licence {record.licence}",
    )
    return " · ".join(word for word in words if word)
