"""Where the engine's blocks come from: the user's sources, and what the factbook composes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

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
    total = Report()
    for source in sorted(map(sources.parse, words), key=lambda s: s.word):
        if source.kind != sources.FACTBOOK:
            total.add(_refine_source(engine, source, clean, strict))
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

        return engine.refine(tasks())


def _refine_source(engine: Engine, source: Source, clean: CleanRecipe, strict: bool) -> Report:
    sources.announce(source)
    first = engine.numbered()
    with Progress(f"data {source.word}", source.size_bytes(), "bytes") as bar:

        def tasks() -> Iterator[Task]:
            for number, block in enumerate(sources.blocks(source), first):
                yield Task(engine.blocks, number, block, clean, strict, source.word)
                bar.update(block.consumed)

        report = engine.refine(tasks())
    report.read.check()
    sources.require_usable(source, report.read)
    return report
