"""Counts by key in open addressing: an int64 array [slots, width], key first, `EMPTY` where none is.

The slots are a power of two; a caller makes room before more than two thirds of them are taken.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from microlm.text.compiled import njit

Table = NDArray[np.int64]

EMPTY = -1
FIRST = 1 << 12
"""Slots of a new table."""
_BELOW = 1 << 16  # counts that `prune` tells apart


class OutOfMemory(Exception):
    """What is to be counted does not fit, however it is done."""


@njit
def spread(value: np.uint64) -> np.uint64:
    """All 64 bits depend on all 64 bits (the end of MurmurHash3)."""
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> np.uint64(33))


@njit
def empty(slots: int, width: int) -> Table:
    """A table without keys, its values 0."""
    table = np.zeros((slots, width), dtype=np.int64)
    table[:, 0] = EMPTY
    return table


@njit
def find(table: Table, key: int) -> int:
    """The row of the key, or the empty row where it belongs."""
    mask = np.uint64(table.shape[0] - 1)
    at = spread(np.uint64(key)) & mask
    while table[np.int64(at), 0] != key and table[np.int64(at), 0] != EMPTY:
        at = (at + np.uint64(1)) & mask
    return int(np.int64(at))


@njit
def is_full(used: int, slots: int) -> bool:
    """Whether a table with so many keys must make room."""
    return 3 * used >= 2 * slots


@njit
def resized(table: Table, slots: int) -> Table:
    """The same keys and values in a table of another size."""
    other = empty(slots, table.shape[1])
    for row in range(table.shape[0]):
        if table[row, 0] != EMPTY:
            other[find(other, table[row, 0])] = table[row]
    return other


@njit
def prune(table: Table, used: int) -> tuple[int, int]:
    """Take the rarest keys out until the table is at most a third full: (keys, highest count lost)."""
    slots = table.shape[0]
    counts = np.zeros(_BELOW, dtype=np.int64)
    for row in range(slots):
        if table[row, 0] != EMPTY and table[row, 1] < _BELOW:
            counts[table[row, 1]] += 1
    lost = 0
    left = used - counts[0]
    while 3 * left > slots and lost + 1 < _BELOW:
        lost += 1
        left -= counts[lost]
    kept = np.empty((left, table.shape[1]), dtype=np.int64)
    done = 0
    for row in range(slots):
        if table[row, 0] != EMPTY and table[row, 1] > lost:
            kept[done] = table[row]
            done += 1
    table[:] = 0
    table[:, 0] = EMPTY
    for row in range(done):
        table[find(table, kept[row, 0])] = kept[row]
    return left, lost


@njit
def added(table: Table, used: int, more: Table, most: int) -> tuple[Table, int, int]:
    """A table [slots, 2] plus the counts of `more` (rows that may be empty), in at most `most` slots.

    Leaves: (table, keys, how much too low a count may have become).
    """
    lost = 0
    for i in range(more.shape[0]):
        if more[i, 0] == EMPTY:
            continue
        if is_full(used, table.shape[0]):
            if table.shape[0] < most:
                table = resized(table, 2 * table.shape[0])
            else:
                used, gone = prune(table, used)
                lost += gone
        row = find(table, more[i, 0])
        if table[row, 0] == EMPTY:
            table[row, 0] = more[i, 0]
            used += 1
        table[row, 1] += more[i, 1]
    return table, used, lost
