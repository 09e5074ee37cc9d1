"""The pairs of the chunks as they are before the first merge, counted and queued."""

from __future__ import annotations

import numpy as np

from microlm.text.bpe.learn.chunks import Columns, Symbols
from microlm.text.bpe.learn.lists import (
    COUNTERS,
    FREE,
    GROUPS,
    NONE,
    PAIRS,
    Groups,
    Ints,
    Nodes,
    Places,
    append,
)
from microlm.text.bpe.learn.queue import Queue, new_queue, push
from microlm.text.bpe.learn.table import EMPTY, FIRST, Table, find, is_full, resized
from microlm.text.compiled import njit

COUNT, NEWEST = 1, 2
"""Columns of the pairs behind the key: how often; the newest group, `NONE`, or -2 less the number of a pair
that the present merge makes."""


@njit
def pair_of(left: int, right: int) -> int:
    return int((np.int64(left) << np.int64(32)) | np.int64(right))


@njit
def words_of(columns: Columns) -> Places:
    """The chunk of every place."""
    words = np.empty(len(columns.symbols), dtype=np.int32)
    words[0] = NONE
    for word in range(len(columns.weights)):
        words[columns.begins[word] : columns.begins[word + 1]] = word
    return words


@njit
def count_pairs(symbols: Symbols, words: Places, weights: Ints) -> tuple[Table, Ints]:
    """The pairs of all chunks (key, count, newest group), and the trainer's counters."""
    pairs, state = np.full((FIRST, 3), EMPTY, dtype=np.int64), np.zeros(COUNTERS, dtype=np.int64)
    state[FREE] = NONE
    for at in range(len(symbols) - 1):
        if symbols[at] < 0 or symbols[at + 1] < 0:
            continue
        row = find(pairs, pair_of(symbols[at], symbols[at + 1]))
        if pairs[row, 0] == EMPTY:
            if is_full(state[PAIRS], pairs.shape[0]):
                pairs = resized(pairs, 2 * pairs.shape[0])
                row = find(pairs, pair_of(symbols[at], symbols[at + 1]))
            pairs[row] = pair_of(symbols[at], symbols[at + 1]), 0, NONE
            state[PAIRS] += 1
        pairs[row, COUNT] += weights[words[at]]
    return pairs, state


@njit
def queue_all(symbols: Symbols, pairs: Table, state: Ints, least: int) -> tuple[Nodes, Groups, Queue]:
    """A group and an entry for every pair that is frequent enough, and its places in order."""
    many = 0
    for row in range(pairs.shape[0]):
        many += pairs[row, 0] != EMPTY and pairs[row, COUNT] >= least
    groups = Groups(
        np.full(many + 16, NONE, dtype=np.int32),
        np.full(many + 16, NONE, dtype=np.int32),
        np.zeros(many + 16, dtype=np.bool_),
    )
    queue = new_queue(many + 16)
    for row in range(pairs.shape[0]):
        if pairs[row, 0] != EMPTY and pairs[row, COUNT] >= least:
            pairs[row, NEWEST] = state[GROUPS]
            queue = push(queue, pairs[row, COUNT], pairs[row, 0], state[GROUPS])
            state[GROUPS] += 1
    nodes = Nodes(np.empty(len(symbols) + 16, dtype=np.int32), np.empty(len(symbols) + 16, dtype=np.int32))
    for at in range(len(symbols) - 1):
        if symbols[at] >= 0 and symbols[at + 1] >= 0:
            group = pairs[find(pairs, pair_of(symbols[at], symbols[at + 1])), NEWEST]
            if group >= 0:
                append(nodes, groups.head, groups.tail, group, at, state)
    return nodes, groups, queue
