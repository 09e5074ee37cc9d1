"""Merges applied to symbols: always the lowest rank, of equals the leftmost, as `tokenizers` does it.

Enters: symbols, and a table of pairs. Leaves: the symbols that remain. Short stretches are searched anew for
each merge; long ones keep a heap, so that time grows with n log n on any input.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from microlm.text.compiled import njit

Symbols = NDArray[np.int32]
Values = NDArray[np.uint64]

ABSENT = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
"""The value of a pair that does not merge, and the key of an empty slot."""
SHORT = 96
"""Stretches of more symbols go through the heap."""
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFF_FFFF)
_ONE = np.uint64(1)
_MIX = np.uint64(0x9E37_79B9_7F4A_7C15)


Rows = NDArray[np.uint64]
"""An open-addressing table of 2^n rows: left << 32 | right, then rank << 32 | id; an empty key is ABSENT."""


def pair_table(values: dict[tuple[int, int], int]) -> Rows:
    """The table of `(left, right) → rank << 32 | id`, at most 40 % full."""
    rows = np.full((1 << max(4, (len(values) * 5 // 2).bit_length()), 2), ABSENT, dtype=np.uint64)
    keys = np.fromiter((left << 32 | right for left, right in values), dtype=np.uint64, count=len(values))
    _fill(rows, keys, np.fromiter(values.values(), dtype=np.uint64, count=len(values)))
    return rows


@njit
def _fill(rows: Rows, keys: Values, values: Values) -> None:
    last = np.uint64(len(rows) - 1)
    for x in range(len(keys)):
        slot = ((keys[x] * _MIX) >> _HALF) & last
        while rows[slot, 0] != ABSENT:
            slot = (slot + _ONE) & last
        rows[slot, 0] = keys[x]
        rows[slot, 1] = values[x]


@njit
def find(rows: Rows, left: int, right: int) -> np.uint64:
    """The value of a pair, ABSENT if it does not merge; the lower of two values is merged first."""
    key = (np.uint64(left) << _HALF) | np.uint64(right)
    last = np.uint64(len(rows) - 1)
    slot = ((key * _MIX) >> _HALF) & last
    while rows[slot, 0] != key:
        if rows[slot, 0] == ABSENT:
            return ABSENT
        slot = (slot + _ONE) & last
    return rows[slot, 1]


@njit
def join(ids: Symbols, values: Values, count: int, rows: Rows) -> int:
    """Merge the first `count` of `ids` in place; returns how many remain. `values` is room for as many."""
    for x in range(count - 1):
        values[x] = find(rows, ids[x], ids[x + 1])
    return _join_short(ids, values, count, rows) if count <= SHORT else _join_long(ids, values, count, rows)


@njit
def _join_short(ids: Symbols, values: Values, count: int, rows: Rows) -> int:
    while count > 1:
        best, at = ABSENT, 0
        for x in range(count - 1):
            if values[x] < best:
                best, at = values[x], x
        if best == ABSENT:
            break
        count -= 1
        ids[at] = np.int32(best & _LOW)
        for x in range(at + 1, count):
            ids[x] = ids[x + 1]
            values[x - 1] = values[x]
        if at + 1 < count:
            values[at] = find(rows, ids[at], ids[at + 1])
        if at > 0:
            values[at - 1] = find(rows, ids[at - 1], ids[at])
    return count


@njit
def _join_long(ids: Symbols, values: Values, count: int, rows: Rows) -> int:
    after = np.arange(1, count + 1, dtype=np.int32)
    before = np.arange(-1, count - 1, dtype=np.int32)
    values[count - 1] = ABSENT
    heap = np.empty(2 * count, dtype=np.uint64)  # each merge takes one entry and brings at most two
    size = 0
    for x in range(count - 1):
        size = _push(heap, size, values[x], x)
    while size > 0:
        top = heap[0]
        size = _pop(heap, size)
        at = int(top & _LOW)
        if values[at] >> _HALF != top >> _HALF:
            continue  # the pair is no longer there
        ids[at] = np.int32(values[at] & _LOW)
        gone = after[at]
        right, left = after[gone], before[at]
        values[gone] = ABSENT
        after[at] = right
        values[at] = ABSENT
        if right < count:
            before[right] = at
            values[at] = find(rows, ids[at], ids[right])
            size = _push(heap, size, values[at], at)
        if left >= 0:
            values[left] = find(rows, ids[left], ids[at])
            size = _push(heap, size, values[left], left)
    left_over, at = 0, 0
    while at < count:
        ids[left_over] = ids[at]
        left_over += 1
        at = int(after[at])
    return left_over


@njit
def _push(heap: Values, size: int, value: np.uint64, at: int) -> int:
    """Add a pair that merges, as rank << 32 | place; returns the heap's size."""
    if value == ABSENT:
        return size
    item = (value & ~_LOW) | np.uint64(at)
    hole = size
    while hole > 0:
        parent = (hole - 1) >> 1
        if heap[parent] <= item:
            break
        heap[hole] = heap[parent]
        hole = parent
    heap[hole] = item
    return size + 1


@njit
def _pop(heap: Values, size: int) -> int:
    """Take the least away; returns the heap's size."""
    size -= 1
    item = heap[size]
    hole, child = 0, 1
    while child < size:
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if item <= heap[child]:
            break
        heap[hole] = heap[child]
        hole, child = child, 2 * child + 1
    heap[hole] = item
    return size
