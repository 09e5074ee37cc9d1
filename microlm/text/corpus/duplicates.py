"""Exact and near duplicates: of records that say the same, the longest stays, then that of the smallest tie.

The choice depends on content alone, never on the order of files or blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from microlm.core.metrics import Progress
from microlm.text.corpus.pool import Pool
from microlm.text.corpus.store import DOCUMENTS, ENTRY, EXACT, KEPT, NEAR, OPEN_FILES, Entries, Reader, Store
from microlm.text.near import index, signature


def exact(store: Store) -> Iterator[tuple[int, int, int]]:
    """Mark the exact duplicates in the states of all blocks; yields (kind, block, row) of each."""
    states = [store.state(n) for n in range(store.count)]
    pieces = store.pieces()
    for piece in range(pieces):
        blocks, rows, entries = store.kept(piece, pieces)
        for at in np.flatnonzero(_repeats(entries)).tolist():
            block, row = int(blocks[at]), int(rows[at])
            states[block][row] = EXACT
            yield int(entries["kind"][at]), block, row
    for number, state in enumerate(states):
        store.set_state(number, state)


def _repeats(entries: Entries) -> NDArray[np.bool_]:
    """True for every record but the best of those that say the same."""
    order = np.lexsort(
        (entries["tie"], ~entries["chars"], entries["lo"], entries["hi"], entries["kind"])
    )  # the last key counts most; ~ puts the longest first
    same = np.zeros(len(entries), dtype=bool)
    if len(entries):
        ordered = entries[order]
        equal = np.ones(len(entries) - 1, dtype=bool)
        for name in ("kind", "hi", "lo"):
            equal &= ordered[name][1:] == ordered[name][:-1]
        same[order[1:]] = equal
    return same


def near(pool: Pool, store: Store, threshold: float, memory_mb: int) -> Iterator[tuple[int, int]]:
    """Mark the near duplicates among the kept documents; yields (block, row) of each."""
    with Progress("data near duplicates", store.count, "blocks") as bar:
        for _ in pool.map(_sign, ((store, n, threshold) for n in range(store.count))):
            bar.update(1)
    rows = [_documents(store, n) for n in range(store.count)]
    first = np.cumsum([0, *(len(r) for r in rows)])
    entries = functools.lru_cache(OPEN_FILES)(store.entries)
    with Reader(store.folder) as reader:

        def texts(documents: Sequence[int]) -> list[str]:
            found = []
            blocks = np.searchsorted(first, documents, side="right") - 1
            for number, block in zip(documents, blocks.tolist(), strict=True):
                row = rows[block][number - first[block]]
                found.append(reader.body(block, entries(block)[row]).decode("utf-8"))
            return found

        search = index.NearIndex(store.folder, store.count, memory_mb)
        ranks = _ranks(store, rows)
        outcome = search.resolve(ranks, lambda pairs: signature.jaccards(texts, pairs), threshold)
    removed = outcome.removed()
    at = np.searchsorted(first, removed, side="right") - 1
    for block in np.unique(at).tolist():
        state = store.state(block)
        mine = rows[block][removed[at == block] - first[block]]
        state[mine] = NEAR
        store.set_state(block, state)
        yield from ((block, row) for row in mine.tolist())


def _sign(task: tuple[Store, int, float]) -> None:
    store, number, threshold = task
    text, _, starts, sizes = store.documents(number)
    index.write(store.folder, number, *signature.sign_bytes(text, starts, sizes, threshold))


def _documents(store: Store, number: int) -> NDArray[np.int64]:
    return np.flatnonzero((store.state(number) == KEPT) & (store.entries(number)["kind"] == DOCUMENTS))


def _ranks(store: Store, rows: list[NDArray[np.int64]]) -> NDArray[np.uint64]:
    """The place of every document in the order of preference: the longest first."""
    columns = [
        np.concatenate([np.zeros(0, ENTRY[name]), *(store.entries(n)[name][r] for n, r in enumerate(rows))])
        for name in ("tie", "lo", "hi", "chars")
    ]
    order = np.lexsort((*columns[:3], ~columns[3]))
    ranks = np.empty(len(order), dtype=np.uint64)
    ranks[order] = np.arange(len(order), dtype=np.uint64)
    return ranks
