"""Lines that many documents share (navigation, notices): counted over the kept documents, then taken out.

A line counts once in a document; which lines are known by a 64-bit hash of their trimmed bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from microlm.core import storage
from microlm.core.metrics import Progress
from microlm.core.records import Document
from microlm.text.clean import MAX_EXAMPLES, Effects
from microlm.text.compiled import njit
from microlm.text.corpus.pool import Pool
from microlm.text.corpus.store import LINES, Bytes, Numbers, Store, ranges, save_array, split_digest
from microlm.text.dedup import digest
from microlm.text.near.kernels import Hashes

RULE = "repeated_lines"
Change = tuple[int, Effects, list[int]]
"""A block's number, what was taken out of it, and the rows of documents of which nothing was left."""
MIN_CHARS, MAX_CHARS = 10, 400
"""Shorter lines are headings and names, longer ones are matter for the near duplicates."""
PIECE_BYTES = 8 << 20
BREAK, SPACE = 10, 32
COUNTED = np.dtype([("line", "<u8"), ("documents", "<u4")])


def find(pool: Pool, store: Store, documents: int) -> Hashes:
    """The lines that at least so many kept documents hold."""
    with Progress("data repeated lines", store.count, "blocks") as bar:
        for _ in pool.map(_count, ((store, n) for n in range(store.count))):
            bar.update(1)
    return repeated([_counts(store, n) for n in range(store.count)], documents)


def remove(
    pool: Pool, store: Store, found: Hashes, min_chars: int, effects: Effects
) -> Iterator[tuple[int, int]]:
    """Take the lines out; yields (block, row) of the documents that are left with fewer than `min_chars`."""
    if not len(found):
        return
    save_array(store.folder / "lines.npy", found)
    for number, changed, dropped in pool.map(_remove, ((store, n, min_chars) for n in range(store.count))):
        effects.add(changed)
        for row in dropped:
            yield number, row


def _counts(store: Store, number: int) -> Path:
    return store.folder / f"{number:05d}.lines.npy"


def _count(task: tuple[Store, int]) -> None:
    store, number = task
    text, _, starts, sizes = store.documents(number)
    save_array(_counts(store, number), count_lines(text, starts, sizes))


def _remove(task: tuple[Store, int, int]) -> Change:
    store, number, min_chars = task
    found = np.load(store.folder / "lines.npy")
    text, rows, starts, sizes = store.documents(number)
    touched, places = _listed(text, starts, sizes, found)
    effects = Effects()
    if not len(touched):
        return number, effects, []
    entries, state = np.array(store.entries(number)), store.state(number)
    assert not entries["changed"].any(), "lines are taken out once"
    pieces: list[bytes] = []
    offset = 0
    for d, gone in zip(touched.tolist(), places, strict=True):
        entry = entries[rows[d]]
        start, size, meta = int(entry["offset"]), int(entry["size"]), int(entry["meta"])
        stored = text[start : start + size + meta].tobytes()
        before, rest = stored[:size].decode("utf-8"), stored[size:]
        shorter = without(stored[:size], (gone - start).tolist())
        _note(effects, before, shorter, rest)
        if len(shorter) < max(1, min_chars):
            state[rows[d]] = LINES
            continue
        body = shorter.encode("utf-8")
        pieces += [body, rest]
        entry["hi"], entry["lo"] = split_digest(digest(shorter))
        entry["offset"], entry["size"], entry["chars"], entry["changed"] = offset, len(body), len(shorter), 1
        offset += len(body) + meta
    with storage.explain_write(store.folder):
        (store.folder / f"{number:05d}.changed").write_bytes(b"".join(pieces))
    store.set_entries(number, entries, state)
    dropped = np.flatnonzero(store.state(number) == LINES).tolist()
    return number, effects, dropped


@njit
def hash_lines(text: Bytes, starts: Numbers, sizes: Numbers) -> tuple[Hashes, Numbers, Numbers]:
    """(hash, document, place) of each line of 10 to 400 characters of text[start : start + size]."""
    count = len(starts)
    for d in range(len(starts)):
        for byte in text[starts[d] : starts[d] + sizes[d]]:
            count += byte == BREAK
    hashes = np.empty(count, dtype=np.uint64)
    documents = np.empty(count, dtype=np.int64)
    places = np.empty(count, dtype=np.int64)
    found = 0
    for d in range(len(starts)):
        some = text[starts[d] : starts[d] + sizes[d]]
        at = 0
        while at < len(some):
            start = at
            while at < len(some) and some[at] == SPACE:
                at += 1
            value = trimmed = np.uint64(0xCBF29CE484222325)
            chars = seen = 0
            while at < len(some) and some[at] != BREAK:
                value = (value ^ np.uint64(some[at])) * np.uint64(0x100000001B3)
                seen += (some[at] & 0xC0) != 0x80
                if some[at] != SPACE:
                    trimmed, chars = value, seen
                at += 1
            if MIN_CHARS <= chars <= MAX_CHARS:
                hashes[found] = trimmed ^ (trimmed >> np.uint64(29))
                documents[found] = d
                places[found] = starts[d] + start
                found += 1
            at += 1
    return hashes[:found], documents[:found], places[:found]


def count_lines(text: Bytes, starts: Numbers, sizes: Numbers) -> NDArray[np.void]:
    """The lines of a block with the number of its documents that hold them, by hash."""
    hashes, documents, _ = hash_lines(text, starts, sizes)
    order = np.argsort(hashes, kind="stable")  # a line's documents stay in order
    hashes, documents = hashes[order], documents[order]
    is_first = np.ones(len(hashes), dtype=bool)
    is_first[1:] = (hashes[1:] != hashes[:-1]) | (documents[1:] != documents[:-1])
    lines, counts = np.unique(hashes[is_first], return_counts=True)
    found = np.empty(len(lines), dtype=COUNTED)
    found["line"], found["documents"] = lines, counts
    return found


def repeated(paths: Sequence[Path], documents: int) -> Hashes:
    """The lines that at least so many documents hold, over all blocks, sorted; in bounded memory."""
    found = [np.zeros(0, dtype=np.uint64)]
    for counted in ranges(paths, "line", PIECE_BYTES):
        counted = counted[np.argsort(counted["line"], kind="stable")]
        lines, first = np.unique(counted["line"], return_index=True)
        if len(lines):
            totals = np.add.reduceat(counted["documents"].astype(np.int64), first)
            found.append(lines[totals >= documents])
    return np.concatenate(found)


def without(text: bytes, lines: Sequence[int]) -> str:
    """The text without the lines that begin at these places."""
    kept, at = [], 0
    for place in lines:
        kept.append(text[at:place])
        at = text.find(b"\n", place) + 1 or len(text)
    return b"".join([*kept, text[at:]]).decode("utf-8").strip()


def _listed(text: Bytes, starts: Numbers, sizes: Numbers, lines: Hashes) -> tuple[Numbers, list[Numbers]]:
    """Which documents hold listed lines, and where in the text those of each begin."""
    hashes, documents, places = hash_lines(text, starts, sizes)
    found = _holds(lines, hashes)
    holders, first = np.unique(documents[found], return_index=True)
    return holders, np.split(places[found], first[1:])


def _note(effects: Effects, before: str, after: str, meta: bytes) -> None:
    if effects.changed[RULE] < MAX_EXAMPLES:
        source, licence = json.loads(meta)
        effects.note(RULE, Document(before, source, licence), Document(after, source, licence))
    else:
        effects.changed[RULE] += 1


def _holds(lines: Hashes, hashes: Hashes) -> NDArray[np.bool_]:
    at = np.minimum(np.searchsorted(lines, hashes), len(lines) - 1)
    found: NDArray[np.bool_] = lines[at] == hashes
    return found
