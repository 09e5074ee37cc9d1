"""A heap of pairs with their counts: the most frequent first, then the smaller pair, then the older entry."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microlm.text.compiled import njit


class Queue(NamedTuple):
    """Entries in heap order; `size[0]` of them are in use."""

    counts: NDArray[np.int64]
    keys: NDArray[np.int64]
    numbers: NDArray[np.int64]
    size: NDArray[np.int64]


@njit
def new_queue(capacity: int) -> Queue:
    """An empty queue."""
    return Queue(
        np.empty(capacity, dtype=np.int64),
        np.empty(capacity, dtype=np.int64),
        np.empty(capacity, dtype=np.int64),
        np.zeros(1, dtype=np.int64),
    )


@njit
def doubled(array: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same values in an array of twice the length."""
    longer = np.empty(2 * len(array), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


@njit
def push(queue: Queue, count: int, key: int, number: int) -> Queue:
    """The queue with one entry more."""
    at = queue.size[0]
    if at == len(queue.counts):
        queue = Queue(doubled(queue.counts), doubled(queue.keys), doubled(queue.numbers), queue.size)
    queue.size[0] = at + 1
    while at > 0:
        above = (at - 1) >> 1
        if not _is_before(count, key, number, queue, above):
            break
        _move(queue, above, at)
        at = above
    queue.counts[at], queue.keys[at], queue.numbers[at] = count, key, number
    return queue


@njit
def pop(queue: Queue) -> tuple[int, int, int]:
    """Take the first entry out: (count, key, number)."""
    first = queue.counts[0], queue.keys[0], queue.numbers[0]
    last = queue.size[0] - 1
    queue.size[0] = last
    count, key, number = queue.counts[last], queue.keys[last], queue.numbers[last]
    at = 0
    while 2 * at + 1 < last:
        below = 2 * at + 1
        if below + 1 < last:
            other = below + 1
            if _is_before(queue.counts[other], queue.keys[other], queue.numbers[other], queue, below):
                below = other
        if _is_before(count, key, number, queue, below):
            break
        _move(queue, below, at)
        at = below
    queue.counts[at], queue.keys[at], queue.numbers[at] = count, key, number
    return first


@njit
def _is_before(count: int, key: int, number: int, queue: Queue, at: int) -> bool:
    if count != queue.counts[at]:
        return bool(count > queue.counts[at])
    if key != queue.keys[at]:
        return bool(key < queue.keys[at])
    return bool(number < queue.numbers[at])


@njit
def _move(queue: Queue, source: int, target: int) -> None:
    queue.counts[target] = queue.counts[source]
    queue.keys[target] = queue.keys[source]
    queue.numbers[target] = queue.numbers[source]
