"""A heap of pairs with their counts: the most frequent first, of two as frequent the smaller pair."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microlm.text.compiled import njit


class Queue(NamedTuple):
    """Entries in heap order; `size[0]` of them are in use."""

    counts: NDArray[np.int64]
    keys: NDArray[np.int64]
    size: NDArray[np.int64]


@njit
def new_queue(capacity: int) -> Queue:
    """An empty queue."""
    counts, keys = np.empty(capacity, dtype=np.int64), np.empty(capacity, dtype=np.int64)
    return Queue(counts, keys, np.zeros(1, dtype=np.int64))


@njit
def push(queue: Queue, count: int, key: int) -> Queue:
    """The queue with one entry more."""
    at = queue.size[0]
    if at == len(queue.counts):
        spare = np.empty_like(queue.counts)
        queue = Queue(np.concatenate((queue.counts, spare)), np.concatenate((queue.keys, spare)), queue.size)
    queue.size[0] = at + 1
    while at > 0:
        above = (at - 1) >> 1
        if not _is_before(count, key, queue, above):
            break
        queue.counts[at], queue.keys[at] = queue.counts[above], queue.keys[above]
        at = above
    queue.counts[at], queue.keys[at] = count, key
    return queue


@njit
def pop(queue: Queue) -> tuple[int, int]:
    """Take the first entry out: (count, key)."""
    first = queue.counts[0], queue.keys[0]
    last = queue.size[0] - 1
    queue.size[0] = last
    count, key = queue.counts[last], queue.keys[last]
    at = 0
    while 2 * at + 1 < last:
        below = 2 * at + 1
        other = below + 1
        if other < last and _is_before(queue.counts[other], queue.keys[other], queue, below):
            below = other
        if _is_before(count, key, queue, below):
            break
        queue.counts[at], queue.keys[at] = queue.counts[below], queue.keys[below]
        at = below
    queue.counts[at], queue.keys[at] = count, key
    return first


@njit
def _is_before(count: int, key: int, queue: Queue, at: int) -> bool:
    if count != queue.counts[at]:
        return bool(count > queue.counts[at])
    return bool(key < queue.keys[at])
