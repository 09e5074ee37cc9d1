"""The pairs of all chunks before the first merge, and where each of them begins.

A row of the table of pairs: the pair, how often it occurs, the first and the last node of its list of places.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microlm.text.bpe.learn.chunks import Columns, Symbols
from microlm.text.bpe.learn.queue import Queue, new_queue, push
from microlm.text.bpe.learn.table import EMPTY, FIRST, Table, find, is_full, resized
from microlm.text.compiled import njit

Ints = NDArray[np.int64]
Places = NDArray[np.int32]

COUNT, HEAD, TAIL = 1, 2, 3
NONE = -1
PAIRS, FREE, USED, TOUCHED, TAKEN, FOUND = range(6)
"""The counters of learning: pairs in the table, the first free node, nodes that were ever used, pairs that
the present merge made, other tokens that are as frequent, rows found."""


class Nodes(NamedTuple):
    """Linked lists of places where a pair begins, or began when it was noted."""

    places: Places
    following: Places


@njit
def key_of(left: int, right: int) -> int:
    """A pair as one number; smaller pairs have smaller ones."""
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
    """The table of all pairs, without places, and the counters."""
    pairs, state = np.full((FIRST, 4), EMPTY, dtype=np.int64), np.zeros(6, dtype=np.int64)
    state[FREE] = NONE
    for at in range(len(symbols) - 1):
        if symbols[at] < 0 or symbols[at + 1] < 0:
            continue
        key = key_of(symbols[at], symbols[at + 1])
        row = find(pairs, key)
        if pairs[row, 0] == EMPTY:
            if is_full(state[PAIRS], pairs.shape[0]):
                pairs = resized(pairs, 2 * pairs.shape[0])
                row = find(pairs, key)
            add_pair(pairs, row, key, state)
        pairs[row, COUNT] += weights[words[at]]
    return pairs, state


@njit
def add_pair(pairs: Table, row: int, key: int, state: Ints) -> None:
    """Enter a pair that was not yet seen in the row where it belongs."""
    pairs[row, 0], pairs[row, COUNT], pairs[row, HEAD], pairs[row, TAIL] = key, 0, NONE, NONE
    state[PAIRS] += 1


@njit
def queue_all(symbols: Symbols, pairs: Table, state: Ints, least: int) -> tuple[Nodes, Queue]:
    """An entry for every pair that is frequent enough, and its places, in order."""
    queue = new_queue(1 << 10)
    for row in range(pairs.shape[0]):
        if pairs[row, 0] != EMPTY and pairs[row, COUNT] >= least:
            queue = push(queue, pairs[row, COUNT], pairs[row, 0])
    room = len(symbols) + 16
    nodes = Nodes(np.empty(room, dtype=np.int32), np.empty(room, dtype=np.int32))
    for at in range(len(symbols) - 1):
        if symbols[at] >= 0 and symbols[at + 1] >= 0:
            row = find(pairs, key_of(symbols[at], symbols[at + 1]))
            if pairs[row, COUNT] >= least:
                append(nodes, pairs, row, at, state)
    return nodes, queue


@njit
def append(nodes: Nodes, pairs: Table, row: int, place: int, state: Ints) -> None:
    """Put a place at the end of a pair's list; there is a free node."""
    node = state[FREE]
    if node >= 0:
        state[FREE] = nodes.following[node]
    else:
        node = state[USED]
        state[USED] = node + 1
    nodes.places[node], nodes.following[node] = place, NONE
    if pairs[row, HEAD] >= 0:
        nodes.following[pairs[row, TAIL]] = node
    else:
        pairs[row, HEAD] = node
    pairs[row, TAIL] = node


@njit
def take_places(nodes: Nodes, pairs: Table, row: int, state: Ints) -> Places:
    """The places of a pair, in order; its list is empty afterwards."""
    places, many = np.empty(1 << 8, dtype=np.int32), 0
    node = pairs[row, HEAD]
    while node >= 0:
        if many == len(places):
            places = np.concatenate((places, np.empty_like(places)))
        places[many] = nodes.places[node]
        many += 1
        node = np.int64(nodes.following[node])
    forget_places(nodes, pairs, row, state)
    return places[:many]


@njit
def forget_places(nodes: Nodes, pairs: Table, row: int, state: Ints) -> None:
    """Empty a pair's list; its nodes are free again."""
    if pairs[row, HEAD] >= 0:
        nodes.following[pairs[row, TAIL]] = state[FREE]
        state[FREE] = pairs[row, HEAD]
        pairs[row, HEAD] = pairs[row, TAIL] = NONE
