"""The near duplicates of a corpus. Enters: signatures and band keys by block. Leaves: who stays for whom.

Workers write a sorted file each; what has equal band keys is then brought together by ranges of keys. Neither
memory nor the result depends on the order or the number of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microlm.core import storage
from microlm.text.near import clusters
from microlm.text.near.clusters import LOOKED_AT, REJECTED, Documents, Numbers
from microlm.text.near.kernels import BINS, Hashes, Signatures

Compare = Callable[[Documents], NDArray[np.float64]]
"""The exact Jaccard of each pair [P, 2] of documents, for example `signature.jaccards` of their texts."""
MAX_EXAMPLES = 5
_ROW_BYTES = 384  # that a row costs while its range is looked at, if all documents have candidates
_DIFFER = 1 << 20  # slots; a pair that was forgotten is only compared again
_PAIRS = 1 << 16  # candidates that are held at the same time
_DEVIATIONS = 3.5  # of the estimate below the threshold: 2 in 10,000 pairs are lost


@dataclass
class Duplicates:
    """`keeper[d]` is the best document of d's cluster, d itself if d stays; and how that was found."""

    keeper: Documents
    clusters: int
    candidates: int
    rejected: int
    """Candidates that their signatures already tell apart."""
    compared: int
    """Pairs whose exact Jaccard was computed."""
    examples: list[tuple[int, int, float]] = field(default_factory=list)
    """(removed, kept or itself removed, Jaccard) of a few pairs."""

    def removed(self) -> Numbers:
        """The documents that do not stay."""
        return np.flatnonzero(self.keeper != np.arange(len(self.keeper), dtype=np.uint32))


def write(folder: Path, block: int, signatures: Signatures, bands: Hashes) -> None:
    """Write what `signature.sign` gave for the documents of one block; any process may, in any order."""
    document, band = np.nonzero(bands)
    keys = bands[document, band]
    order = np.argsort(keys, kind="stable")
    found: dict[str, NDArray[Any]] = {
        "keys": keys[order],
        "documents": document[order].astype(np.uint32),
        "signatures": signatures,
    }
    for kind, array in found.items():
        path = _path(folder, block, kind)
        part = path.with_name(f"{path.name}.part")
        with storage.explain_write(part):
            part.write_bytes(np.ascontiguousarray(array).data)  # tofile hides why it cannot write
            part.replace(path)


class NearIndex:
    """What `write` left in a folder for blocks 0, 1 …; the documents of all blocks are numbered through."""

    def __init__(self, folder: Path, blocks: int, memory_mb: int = 256) -> None:
        self.folder, self.blocks = folder, blocks
        sizes = [_path(folder, n, "signatures").stat().st_size // BINS for n in range(blocks)]
        self._first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.count = int(self._first[-1])
        rows = sum(_path(folder, n, "keys").stat().st_size // 8 for n in range(blocks))
        ranges = max(1, -(-rows * _ROW_BYTES // (memory_mb << 20)))
        inner = np.array([(n << 64) // ranges for n in range(1, ranges)], dtype=np.uint64)
        self._bounds = np.array([_bounds(_path(folder, n, "keys"), inner) for n in range(blocks)]).T
        """Where in the files of each block the ranges begin and end, [ranges + 1, blocks]."""

    def resolve(self, ranks: Hashes, compare: Compare, threshold: float = 0.8) -> Duplicates:
        """Join documents with a Jaccard of at least `threshold`; the one of lowest rank of a cluster stays.

        ranks [count] says which of two documents is better; as long as it follows from what they say, so do
        the clusters, the documents that stay and all counts.
        """
        search = _Search(np.asarray(ranks), compare, threshold)
        for start, stop in pairwise(self._bounds):
            search.look_at(self._groups(start, stop, search.ranks), self._signatures)
        return search.outcome()

    def _groups(self, start: Numbers, stop: Numbers, ranks: Hashes) -> tuple[Numbers, Documents]:
        """(group, document) of each block's rows start : stop with a key in common, by key and rank."""
        keys, documents = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.uint32)]
        for block in np.flatnonzero(stop > start).tolist():
            count = stop[block] - start[block]
            for kind, parts in (("keys", keys), ("documents", documents)):
                dtype, path = parts[0].dtype, _path(self.folder, block, kind)
                parts.append(np.fromfile(path, dtype, count, offset=start[block] * dtype.itemsize))
            documents[-1] += np.uint32(self._first[block])
        return _grouped(np.concatenate(keys), np.concatenate(documents), ranks)

    def _signatures(self, documents: Documents) -> Signatures:
        """The signatures [D, 128] of documents, which are sorted."""
        found = np.empty((len(documents), BINS), dtype=np.uint8)
        bounds = np.searchsorted(documents, self._first)
        for block in np.flatnonzero(np.diff(bounds)).tolist():
            here = slice(bounds[block], bounds[block + 1])
            path = _path(self.folder, block, "signatures")
            mapped = np.memmap(path, np.uint8, "r").reshape(-1, BINS)
            found[here] = mapped[documents[here] - self._first[block]]
        return found


class _Search:
    """The clusters found so far."""

    def __init__(self, ranks: Hashes, compare: Compare, threshold: float) -> None:
        self.ranks, self._compare, self._threshold = ranks, compare, threshold
        deviation = _DEVIATIONS * float(np.sqrt(threshold * (1 - threshold) * BINS))
        self._least = int(np.floor(threshold * BINS - deviation))
        self._parent = np.arange(len(ranks), dtype=np.uint32)
        self._differ = np.zeros(_DIFFER, dtype=np.uint64)
        self._counts = np.zeros(4, dtype=np.int64)
        self._compared = 0
        self._examples: list[tuple[int, int, float]] = []

    def look_at(
        self, groups: tuple[Numbers, Documents], signatures: Callable[[Documents], Signatures]
    ) -> None:
        """Compare the members of the groups with each other."""
        first, documents = self._open(*groups)
        distinct, places = np.unique(documents, return_inverse=True)
        rows = first, documents, places.astype(np.int64)
        values = signatures(distinct)
        out = np.empty((_PAIRS, 2), dtype=np.uint32)
        self._counts[:LOOKED_AT] = 0  # from the first row on
        while self._counts[clusters.ROW] < len(first):
            found = clusters.candidates(
                rows, values, self.ranks, self._parent, self._differ, self._least, self._counts, out
            )
            for pairs in self._rounds(_once(out[:found])):
                self._verify(pairs)

    def _open(self, group: Numbers, documents: Documents) -> tuple[Numbers, Documents]:
        """(first row of its group, document) of the groups that are not one cluster already."""
        if not len(group):
            return group, documents
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        sizes = np.diff(starts, append=len(group))
        roots = clusters.roots(self._parent, documents)
        apart = np.minimum.reduceat(roots, starts) != np.maximum.reduceat(roots, starts)
        first = np.cumsum(sizes[apart]) - sizes[apart]
        return np.repeat(first, sizes[apart]), documents[np.repeat(apart, sizes)]

    def _rounds(self, pairs: Documents) -> Iterator[Documents]:
        """Pairs none of which follows from the others of its round or from what is known by then."""
        while len(pairs):
            roots = clusters.roots(self._parent, pairs.reshape(-1))
            distinct, inverse = np.unique(roots, return_inverse=True)
            ends = inverse.reshape(-1, 2).astype(np.int64)
            chosen = clusters.forest(ends, len(distinct))
            yield pairs[chosen]
            pairs = pairs[~chosen & (ends[:, 0] != ends[:, 1])]

    def _verify(self, pairs: Documents) -> None:
        if not len(pairs):
            return
        jaccards = self._compare(pairs)
        alike = jaccards >= self._threshold
        clusters.settle(pairs, alike, self.ranks, self._parent, self._differ)
        self._compared += len(pairs)
        for i in np.flatnonzero(alike)[: MAX_EXAMPLES - len(self._examples)].tolist():
            better, worse = pairs[i].tolist()
            self._examples.append((worse, better, float(jaccards[i])))

    def outcome(self) -> Duplicates:
        """All documents' keepers."""
        documents = np.arange(len(self.ranks), dtype=np.uint32)
        keeper = clusters.roots(self._parent, documents)
        kept_for = np.zeros(len(documents), dtype=np.bool_)
        kept_for[keeper[keeper != documents]] = True
        candidates, rejected = (int(self._counts[n]) for n in (LOOKED_AT, REJECTED))
        return Duplicates(keeper, int(kept_for.sum()), candidates, rejected, self._compared, self._examples)


def _grouped(keys: Hashes, documents: Documents, ranks: Hashes) -> tuple[Numbers, Documents]:
    """The documents with a key in common, by key and rank, and the number of each one's group."""
    ordered = np.sort(keys)
    common = ordered[1:][ordered[1:] == ordered[:-1]]
    common = common[np.diff(common, prepend=~common[:1]) != 0]  # sorted already; np.unique is slow
    if not len(common):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint32)
    group = np.minimum(np.searchsorted(common, keys), len(common) - 1)
    shared = common[group] == keys
    group, documents = group[shared], documents[shared]
    order = np.lexsort((ranks[documents], group))
    return group[order], documents[order]


def _once(pairs: Documents) -> Documents:
    """The pairs without repetition, in order; bands repeat them."""
    code = pairs[:, 0].astype(np.uint64) << np.uint64(32) | pairs[:, 1]
    _, first = np.unique(code, return_index=True)
    return pairs[np.sort(first)]


def _path(folder: Path, block: int, kind: str) -> Path:
    return folder / f"{block:05d}.near-{kind}"


def _bounds(path: Path, inner: Hashes) -> Numbers:
    """Where the ranges of a sorted file begin, and its end."""
    keys = np.fromfile(path, np.uint64)
    return np.concatenate([[0], np.searchsorted(keys, inner), [len(keys)]])
