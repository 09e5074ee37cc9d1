"""First pass: how often each character occurs, and each pair of neighbours inside a piece.

Enters: texts. Leaves: `PairCounts`. Where memory ends, rare pairs are forgotten; `lost` says how rare.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from microlm.text.bpe.learn import table
from microlm.text.bpe.learn.table import EMPTY, Table, find, is_full, prune, resized
from microlm.text.bpe.pieces import Classes, Codes, Rule, classes, code_points, piece_end, segment_end
from microlm.text.compiled import njit

CODE_POINTS = 0x110000
_BITS = 21  # of a code point
_SLOT_BYTES = 16
_SOME = 1 << 16  # rows
_PAIRS = "pairs"  # the file of a folder in which they are kept, rows of (key, count)
_USED, _LOST = range(2)


class PairCounts:
    """Counts of characters and of pairs, in at most `memory_bytes`."""

    def __init__(self, rule: Rule, memory_bytes: int) -> None:
        self.rule = rule
        self.characters = np.zeros(CODE_POINTS, dtype=np.int64)
        self.pairs: Table = table.empty(table.FIRST, 2)
        self.texts = 0
        self._aside: Path | None = None
        self._state = np.zeros(2, dtype=np.int64)
        slots = max(table.FIRST, memory_bytes * 2 // 3 // _SLOT_BYTES)  # growing, the old one is still there
        self._most = 1 << (slots.bit_length() - 1)

    @property
    def lost(self) -> int:
        """A pair was seen at most so much more often than its count says."""
        return int(self._state[_LOST])

    def add(self, texts: list[str]) -> None:
        """Count some texts."""
        codes, ends = code_points(texts)
        self.pairs = _count(
            codes, ends, classes(), self.rule, self.characters, self.pairs, self._state, self._most
        )
        self.texts += len(texts)

    def save(self, folder: Path) -> None:
        """Write the counts for another process."""
        self._write_pairs(folder / _PAIRS)
        np.save(folder / "characters.npy", self.characters)
        np.save(folder / "head.npy", np.array([self.texts, self.lost]))

    def take(self, folder: Path) -> None:
        """Add the counts that another process saved."""
        texts, lost = np.load(folder / "head.npy")
        self.texts += int(texts)
        self.characters += np.load(folder / "characters.npy")
        self._state[_LOST] += lost
        for rows in _read(folder / _PAIRS):
            self.pairs, used, gone = table.added(self.pairs, self._state[_USED], rows, self._most)
            self._state[:] = used, self.lost + gone

    def set_aside(self, folder: Path) -> None:
        """Keep the pairs on disk; nothing is counted from here on."""
        self._write_pairs(folder / _PAIRS)
        self.pairs, self._aside = table.empty(table.FIRST, 2), folder / _PAIRS

    def size_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        lengths = np.ones(CODE_POINTS, dtype=np.int64)
        for first in (0x80, 0x800, 0x10000):
            lengths[first:] += 1
        return int((self.characters * lengths).sum())

    def highest(self, rank: int) -> int:
        """The count of that rank among characters and pairs, 0 when there are fewer."""
        both = np.concatenate([self.characters, *(rows[:, 1] for rows in self._rows())])
        both = both[both > 0]
        return int(np.partition(both, len(both) - rank)[len(both) - rank]) if 0 < rank <= len(both) else 0

    def frequent(self, cut: int, most_bytes: int) -> Table:
        """The pairs that may have been seen `cut` times, with upper bounds; OutOfMemory if too many."""
        least = cut - self.lost
        keys = sum(int((rows[:, 1] >= least).sum()) for rows in self._rows())
        slots = max(table.FIRST, 1 << (3 * keys // 2).bit_length())
        if slots * _SLOT_BYTES > most_bytes:
            raise table.OutOfMemory
        found, used = table.empty(slots, 2), 0
        for rows in self._rows():
            some = rows[rows[:, 1] >= least]
            some[:, 1] += self.lost
            found, used, _ = table.added(found, used, some, slots)
        return found

    def _rows(self) -> Iterator[Table]:
        """The pairs, some at a time: of the table there may not be room for another one."""
        return _read(self._aside) if self._aside else _used(self.pairs)

    def _write_pairs(self, path: Path) -> None:
        with path.open("wb") as file:
            for rows in _used(self.pairs):
                rows.tofile(file)


def _used(pairs: Table) -> Iterator[Table]:
    for start in range(0, len(pairs), _SOME):
        rows = pairs[start : start + _SOME]
        yield rows[rows[:, 0] != EMPTY]


def _read(path: Path) -> Iterator[Table]:
    with path.open("rb") as file:
        while len(values := np.fromfile(file, dtype=np.int64, count=2 * _SOME)):
            yield values.reshape(-1, 2)


@njit
def pair_key(left: int, right: int) -> int:
    """Two code points as one number."""
    return int((np.int64(left) << np.int64(_BITS)) | np.int64(right))


@njit
def _count(
    codes: Codes,
    ends: NDArray[np.int64],
    kinds: Classes,
    rule: Rule,
    characters: NDArray[np.int64],
    pairs: Table,
    state: NDArray[np.int64],
    most: int,
) -> Table:
    """Count into `characters`, `pairs` and `state`; `pairs` comes back, as another array where it grew."""
    at = stop = 0
    for end in ends:
        stop = at
        while at < end:
            if at >= stop:
                stop = segment_end(codes, at, end, kinds, rule)
            piece = piece_end(codes, at, stop, kinds, rule)
            characters[codes[at]] += 1
            for i in range(at + 1, piece):
                characters[codes[i]] += 1
                key = pair_key(codes[i - 1], codes[i])
                row = find(pairs, key)
                if pairs[row, 0] == EMPTY:
                    pairs[row, 0] = key
                    state[_USED] += 1
                pairs[row, 1] += 1
                if is_full(state[_USED], pairs.shape[0]):
                    if pairs.shape[0] < most:
                        pairs = resized(pairs, 2 * pairs.shape[0])
                    else:
                        state[_USED], lost = prune(pairs, state[_USED])
                        state[_LOST] += lost
            at = piece
    return pairs
