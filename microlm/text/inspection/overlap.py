"""What splits have in common. Enters: the records of blocks. Leaves: repeats, leaks, near leaks, by name.

Workers write what each block says into a folder; memory follows the size of a block, not of the corpus.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microlm.core import storage
from microlm.text.corpus.store import ranges, save_array, split_digest
from microlm.text.dedup import record_digest
from microlm.text.inspection.parts import FOLDERS, ORDER, Part
from microlm.text.near import signature
from microlm.text.near.kernels import BINS, Hashes, Signatures
from microlm.text.read import Record, texts_of
from microlm.text.split import kind_of

SAID = np.dtype(
    [("hi", "<u8"), ("lo", "<u8"), ("kind", "u1"), ("split", "u1"), ("block", "<u4"), ("row", "<u4")]
)
RANGE_BYTES = 64 << 20  # of digests that are looked at together
MAX_EXAMPLES = 20
_PAIRS = 1 << 20  # candidates that are looked at together
_TRIES = 8  # exact comparisons of a held-out record with the most alike of a block
_DEVIATIONS = 3.5  # of the estimate below the threshold, see `near.index`
_KIND = np.uint64(0x9E3779B97F4A7C15)
Near = tuple[int, int, int, float, str]
"""Held-out block and row, the row that is alike, the Jaccard, the kind of both."""


@dataclass
class Repeats:
    """How many records say what an earlier one of their split, or one of another split, says; examples."""

    duplicates: Counter[str] = field(default_factory=Counter)
    leakage: Counter[str] = field(default_factory=Counter)
    pairs: dict[str, list[tuple[tuple[int, int], tuple[int, int]]]] = field(
        default_factory=lambda: {"duplicates": [], "leakage": []}
    )


def write(
    folder: Path, block: int, part: Part, records: Sequence[Record], names: Sequence[str]
) -> NDArray[Any]:
    """Leave the digests of a block in the folder, sorted, and what its records are called."""
    split = ORDER.index(part.split)
    said = np.zeros(len(records), dtype=SAID)
    for row, record in enumerate(records):
        key = record_digest(record)
        numbers = split_digest(key)
        kind = part.kind or kind_of(record)
        said[row] = (*numbers, FOLDERS.index(kind), split, block, row)
    with storage.explain_write(folder):
        save_array(folder / f"{block}.said.npy", said[np.argsort(said["hi"], kind="stable")])
        (folder / f"{block}.names").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    return said


def name(folder: Path, block: int, row: int) -> str:
    """What a record is called: `file:line`, and its source if that is another."""
    return str(_names(folder, block)[row])


@functools.lru_cache(maxsize=4)
def _names(folder: Path, block: int) -> list[str]:
    found: list[str] = json.loads((folder / f"{block}.names").read_bytes())
    return found


def repeats(folder: Path, blocks: int) -> Repeats:
    """Equal digests of records of one kind, over all blocks; there may be more of these than open files."""
    found = Repeats()
    for said in ranges([folder / f"{n}.said.npy" for n in range(blocks)], "hi", RANGE_BYTES):
        _count(said, found)
    return found


def _count(said: NDArray[Any], found: Repeats) -> None:
    """Enter the groups of equal digests; in a group the records come by split, training first."""
    said = said[np.lexsort([said[k] for k in ("row", "block", "split", "lo", "hi", "kind")])]
    new = np.ones(len(said), dtype=bool)
    for key in ("kind", "hi", "lo"):
        new[1:] &= said[key][1:] == said[key][:-1]
    new[:1] = False
    first = np.maximum.accumulate(np.where(new, 0, np.arange(len(said))))
    before = np.maximum(np.arange(len(said)) - 1, 0)
    same_split = said["split"] == said["split"][before]
    for kind, rows, others in (
        ("duplicates", np.flatnonzero(new & same_split), before),
        ("leakage", np.flatnonzero(new & (said["split"] != said["split"][first])), first),
    ):
        getattr(found, kind).update(FOLDERS[k] for k in said["kind"][rows].tolist())
        examples = found.pairs[kind]
        for row in rows[: MAX_EXAMPLES - len(examples)].tolist():
            mine, other = said[row], said[others[row]]
            examples.append(
                ((int(mine["block"]), int(mine["row"])), (int(other["block"]), int(other["row"])))
            )


@dataclass(frozen=True)
class HeldOut:
    """The held-out records of a block: band keys sorted with the row of each; signatures; digests; texts."""

    keys: Hashes
    rows: NDArray[np.uint32]
    signatures: Signatures
    said: NDArray[Any]
    ends: NDArray[np.int64]
    texts: NDArray[np.uint8]

    def text(self, row: int) -> str:
        """The text of a record."""
        start = int(self.ends[row - 1]) if row else 0
        return bytes(self.texts[start : int(self.ends[row])]).decode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Signed:
    """The texts of a block with their signatures and band keys, 0 for a text without tokens."""

    texts: Sequence[str]
    said: NDArray[Any]
    signatures: Signatures
    bands: Hashes


def sign(records: Sequence[Record], said: NDArray[Any], threshold: float) -> Signed:
    """The signatures of a block; records of different kinds share no band key."""
    texts = ["\n".join(texts_of(record)) for record in records]
    signatures, bands = signature.sign(texts, threshold)
    shifted = bands + (said["kind"].astype(np.uint64) * _KIND)[:, None]
    return Signed(
        texts, said, signatures, np.where(bands == 0, np.uint64(0), np.maximum(shifted, np.uint64(1)))
    )


def keep(folder: Path, block: int, signed: Signed) -> None:
    """Leave a held-out block in the folder, for later ones to be compared with."""
    row, band = np.nonzero(signed.bands)
    keys = signed.bands[row, band]
    order = np.argsort(keys, kind="stable")
    raw = [text.encode("utf-8", "surrogatepass") for text in signed.texts]
    arrays: dict[str, NDArray[Any]] = {
        "keys": keys[order],
        "rows": row[order].astype(np.uint32),
        "signatures": signed.signatures,
        "said": signed.said,
        "ends": np.cumsum([len(r) for r in raw], dtype=np.int64),
        "texts": np.frombuffer(b"".join(raw), dtype=np.uint8),
    }
    with storage.explain_write(folder):
        for kind, array in arrays.items():
            np.save(folder / f"{block}.held-{kind}.npy", array)


def alike(folder: Path, signed: Signed, held_out: Sequence[int], threshold: float) -> Iterator[Near]:
    """The held-out records of these blocks that are nearly, not wholly, what one of this block says."""
    for block in held_out:
        columns = ("keys", "rows", "signatures", "said", "ends", "texts")
        held = HeldOut(*(np.load(folder / f"{block}.held-{c}.npy", mmap_mode="r") for c in columns))
        for (row, mine), value in _matches(held, signed, threshold).items():
            yield block, row, mine, value, FOLDERS[held.said["kind"][row]]


def _matches(held: HeldOut, signed: Signed, threshold: float) -> dict[tuple[int, int], float]:
    """(held-out row, row) → Jaccard, one for each held-out row that has any."""
    least = threshold - _DEVIATIONS * float(np.sqrt(threshold * (1 - threshold) / BINS))
    found: dict[tuple[int, int], float] = {}
    sets: dict[int, Hashes] = {}
    done = np.zeros(len(held.ends), dtype=bool)
    for theirs, mine in _candidates(held, signed):
        open_ = ~done[theirs]
        theirs, mine = theirs[open_], mine[open_]
        different = np.ones(len(theirs), dtype=bool)
        for half in ("hi", "lo"):
            different &= held.said[half][theirs] == signed.said[half][mine]
        share = np.mean(held.signatures[theirs] == signed.signatures[mine], axis=1) if len(theirs) else mine
        worth = np.flatnonzero(~different & (share >= least))
        order = worth[np.lexsort([mine[worth], -share[worth], theirs[worth]])]
        tries: Counter[int] = Counter()
        for at in order.tolist():
            row, other = int(theirs[at]), int(mine[at])
            tries[row] += 1
            if done[row] or tries[row] > _TRIES:
                continue
            if other not in sets:
                sets[other] = signature.shingles(signed.texts[other])
            value = signature.jaccard(signature.shingles(held.text(row)), sets[other])
            if value >= threshold:
                done[row] = True
                found[row, other] = value
    return found


def _candidates(held: HeldOut, signed: Signed) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(held-out row, row) of records that share a band key, at most about a million pairs a time."""
    for band in range(signed.bands.shape[1]):
        keys = signed.bands[:, band]
        first, last = (np.searchsorted(held.keys, keys, side=side) for side in ("left", "right"))
        sizes = np.where(keys == 0, 0, last - first)
        rows = np.flatnonzero(sizes)
        groups = np.cumsum(sizes[rows]) // _PAIRS
        for group in np.unique(groups):
            some = rows[groups == group]
            mine = np.repeat(some, sizes[some])
            offsets = np.arange(len(mine)) - np.repeat(np.cumsum(sizes[some]) - sizes[some], sizes[some])
            yield held.rows[first[mine] + offsets].astype(np.int64), mine
