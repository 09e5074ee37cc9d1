"""Lines that many documents share (navigation, notices): counted over the kept documents, then taken out.

A line counts once in a document; which lines are known by a 64-bit hash of their trimmed bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from microlm.core import storage
from microlm.core.metrics import Progress
from microlm.text.clean import Effects
from microlm.text.compiled import njit
from microlm.text.corpus.pool import Pool
from microlm.text.corpus.refine import document, serialised
from microlm.text.corpus.store import LINES, Entries, Store, ranges, save_array, split_digest
from microlm.text.dedup import digest

RULE = "repeated_lines"
Change = tuple[int, Effects, list[int]]
"""A block's number, what was taken out of it, and the rows of documents of which nothing was left."""
MIN_CHARS, MAX_CHARS = 10, 400
"""Shorter lines are headings and names, longer ones are matter for the near duplicates."""
PIECE_BYTES = 32 << 20
COUNTED = np.dtype([("line", "<u8"), ("documents", "<u4")])
Bytes = NDArray[np.uint8]
Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]


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
    text, rows, entries = store.documents(number)
    starts, sizes = _spans(entries[rows])
    save_array(_counts(store, number), count_lines(text, starts, sizes))


def _remove(task: tuple[Store, int, int]) -> Change:
    store, number, min_chars = task
    found = np.load(store.folder / "lines.npy")
    text, rows, entries = store.documents(number)
    touched = rows[holders(text, *_spans(entries[rows]), found)]
    effects, dropped = Effects(), []
    if not len(touched):
        return number, effects, []
    state = store.state(number)
    pieces: list[bytes] = []
    offset = 0
    for row in touched.tolist():
        entry = entries[row]
        start, size, meta = int(entry["offset"]), int(entry["size"]), int(entry["meta"])
        stored = text[start : start + size + meta].tobytes()
        before = document(stored[:size], stored[size:])
        shorter = without(before.text, found)
        after = type(before)(shorter, before.source, before.licence)
        effects.note(RULE, before, after)
        if len(shorter) < max(1, min_chars):
            state[row] = LINES
            continue
        body, _ = serialised(after)
        pieces += [body, stored[size:]]
        entry["hi"], entry["lo"] = split_digest(digest(shorter))
        entry["offset"], entry["size"], entry["chars"], entry["changed"] = offset, len(body), len(shorter), 1
        offset += len(body) + meta
    with storage.explain_write(store.folder):
        (store.folder / f"{number:05d}.changed").write_bytes(b"".join(pieces))
    store.set_entries(number, entries, state)
    dropped = np.flatnonzero(store.state(number) == LINES).tolist()
    return number, effects, dropped


def _spans(entries: Entries) -> tuple[Numbers, Numbers]:
    return entries["offset"].astype(np.int64), entries["size"].astype(np.int64)


@njit
def hash_lines(text: Bytes, starts: Numbers, sizes: Numbers) -> tuple[Hashes, Numbers, Numbers]:
    """(hash, document, place) of each line of 10 to 400 characters of text[start : start + size]."""
    count = 0
    for d in range(len(starts)):
        count += 1
        for i in range(starts[d], starts[d] + sizes[d]):
            count += text[i] == 10
    hashes = np.empty(count, dtype=np.uint64)
    documents = np.empty(count, dtype=np.int64)
    places = np.empty(count, dtype=np.int64)
    found = 0
    for d in range(len(starts)):
        i, end = starts[d], starts[d] + sizes[d]
        while i < end:
            stop = i
            while stop < end and text[stop] != 10:
                stop += 1
            first, last = i, stop
            while first < last and text[first] == 32:
                first += 1
            while last > first and text[last - 1] == 32:
                last -= 1
            chars, value = 0, np.uint64(0xCBF29CE484222325)
            for k in range(first, last):
                chars += (text[k] & 0xC0) != 0x80
                value = (value ^ np.uint64(text[k])) * np.uint64(0x100000001B3)
            if MIN_CHARS <= chars <= MAX_CHARS:
                hashes[found] = value ^ (value >> np.uint64(29))
                documents[found] = d
                places[found] = i
                found += 1
            i = stop + 1
    return hashes[:found], documents[:found], places[:found]


def count_lines(text: Bytes, starts: Numbers, sizes: Numbers) -> NDArray[np.void]:
    """The lines of a block with the number of its documents that hold them, by hash."""
    hashes, documents, _ = hash_lines(text, starts, sizes)
    pairs = np.unique(np.stack([hashes, documents.astype(np.uint64)]), axis=1)[0] if len(hashes) else hashes
    lines, counts = np.unique(pairs, return_counts=True)
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


def without(text: str, lines: Hashes) -> str:
    """The text without the lines whose hash is listed."""
    raw = text.encode("utf-8")
    hashes, _, places = hash_lines(np.frombuffer(raw, dtype=np.uint8), np.array([0]), np.array([len(raw)]))
    gone = set(places[_holds(lines, hashes)].tolist())
    kept = []
    at = 0
    for line in raw.split(b"\n"):
        if at not in gone:
            kept.append(line)
        at += len(line) + 1
    return b"\n".join(kept).decode("utf-8").strip()


def holders(text: Bytes, starts: Numbers, sizes: Numbers, lines: Hashes) -> Numbers:
    """Which documents hold a listed line."""
    if not len(lines):
        return np.zeros(0, dtype=np.int64)
    hashes, documents, _ = hash_lines(text, starts, sizes)
    return np.unique(documents[_holds(lines, hashes)])


def _holds(lines: Hashes, hashes: Hashes) -> NDArray[np.bool_]:
    at = np.minimum(np.searchsorted(lines, hashes), len(lines) - 1)
    found: NDArray[np.bool_] = lines[at] == hashes
    return found
