"""Where the engine's blocks come from: the user's sources, and what the factbook composes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from microlm.core.metrics import Progress
from microlm.text import sources
from microlm.text.clean import CleanRecipe
from microlm.text.corpus.engine import Engine
from microlm.text.corpus.refine import Report, Task
from microlm.text.read import Record
from microlm.text.sources import Source
from microlm.text.sources.factbook import Factbook
from microlm.text.split import Kind

COMPOSED_BLOCK = 4_000
"""Composed records in a block."""


def refine_sources(engine: Engine, words: list[str], clean: CleanRecipe, strict: bool) -> Report:
    """Refine the user's sources, in the order of their names, with progress on the way."""
    found = sorted((s for s in map(sources.parse, words) if s.kind != sources.FACTBOOK), key=lambda s: s.word)
    reports = {source.word: Report() for source in found}
    last, total = "", Report()
    with ExitStack() as bars:
        for word, report in engine.refine(_tasks(engine, found, bars, clean, strict)):
            if last not in ("", word):
                _require_usable(last, reports[last])
            reports[word].add(report)
            total.add(report)
            last = word
    if last:
        _require_usable(last, reports[last])
    return total


def refine_factbook(engine: Engine, book: Factbook, kinds: list[Kind], own: frozenset[str]) -> Report:
    """Refine the training records of the given kinds, less the tasks that the user's records teach."""
    parts: dict[Kind, Iterable[Record]] = {
        "documents": book.documents,
        "conversations": [c for c in book.conversations if c.task not in own],
        "extraction": book.extraction_train,
        "preferences": book.preferences,
    }
    records = itertools.chain.from_iterable(parts[kind] for kind in kinds)
    first = engine.numbered()
    with Progress("data factbook", sum(len(list(parts[kind])) for kind in kinds), "records") as bar:

        def tasks() -> Iterator[Task]:
            for number in itertools.count(first):
                chunk = tuple(itertools.islice(records, COMPOSED_BLOCK))
                if not chunk:
                    return
                yield Task(engine.blocks, number, chunk, CleanRecipe.model_validate({}))
                bar.update(len(chunk))

        total = Report()
        for _, report in engine.refine(tasks()):
            total.add(report)
        return total


def _tasks(
    engine: Engine, found: list[Source], bars: ExitStack, clean: CleanRecipe, strict: bool
) -> Iterator[Task]:
    """The blocks of all sources, so that no worker waits at the end of one; `bars` holds the open bar."""
    numbers = itertools.count(engine.numbered())
    for source in found:
        sources.announce(source)
        bar = bars.enter_context(Progress(f"data {source.word}", source.size_bytes(), "bytes"))
        for block in sources.blocks(source):
            yield Task(engine.blocks, next(numbers), block, clean, strict, source.word)
            bar.update(block.consumed)
        bars.close()


def _require_usable(word: str, report: Report) -> None:
    report.read.check()
    sources.require_usable(sources.parse(word), report.read)
