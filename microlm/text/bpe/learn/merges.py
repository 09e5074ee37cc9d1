"""Exact byte-pair encoding of weighted chunks: the merges of `tokenizers`' BpeTrainer, in its order.

Enters: symbols in a row with a separator around every chunk. Leaves: rows (left, right, count); row i makes
the token `base` + i. A token that begins at i stands at symbols[i]; one of several places has minus its
length at its second and last place, and something negative in between, so that one can walk both ways.

Two merges never make the same text: where a token begins and ends there were borders all the time, so between
them the same happened everywhere. So a pair is made by one merge only, and from then on its count only falls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from microlm.text.bpe.learn.chunks import SEPARATOR, Columns, Symbols
from microlm.text.bpe.learn.initial import (
    COUNT,
    FOUND,
    HEAD,
    PAIRS,
    TAKEN,
    TOUCHED,
    USED,
    Ints,
    Nodes,
    Places,
    add_pair,
    append,
    count_pairs,
    forget_places,
    key_of,
    queue_all,
    take_places,
    words_of,
)
from microlm.text.bpe.learn.queue import Queue, pop, push
from microlm.text.bpe.learn.table import EMPTY, FIRST, Table, find, is_full
from microlm.text.compiled import njit

_BLOCK = 4096  # places that are replaced before the tables are looked at again
_STEP = 1 << 20  # and before Python looks whether someone wants to stop


class Work(NamedTuple):
    """All that learning goes on with from one step to the next."""

    symbols: Symbols
    words: Places
    weights: Ints
    pairs: Table
    nodes: Nodes
    touched: Ints
    queue: Queue
    found: Ints
    state: Ints


def learn(
    columns: Columns, base: int, room: int, least: int, others: Ints, step: Callable[[int], None]
) -> Ints:
    """Rows (left, right, count) down to a count of `least`. The columns are used up.

    Ends when `room` is taken by rows and by those of `others` (counts, falling) that are as frequent. `step`
    hears how many rows there are, often enough to be stopped there.
    """
    work = _begin(columns, room, least)
    is_done = False
    while not is_done:
        work, is_done = _advance(work, base, room, least, others)
        step(int(work.state[FOUND]))
    return work.found[: work.state[FOUND]]


@njit
def _begin(columns: Columns, room: int, least: int) -> Work:
    """Count all pairs, queue the frequent ones."""
    words = words_of(columns)
    pairs, state = count_pairs(columns.symbols, words, columns.weights)
    nodes, queue = queue_all(columns.symbols, pairs, state, least)
    touched, found = np.empty(4 * _BLOCK, dtype=np.int64), np.empty((room, 3), dtype=np.int64)
    return Work(columns.symbols, words, columns.weights, pairs, nodes, touched, queue, found, state)


@njit
def _advance(work: Work, base: int, room: int, least: int, others: Ints) -> tuple[Work, bool]:
    """Merge until about a million places are replaced: (work, whether it is finished)."""
    state, done = work.state, 0
    while work.queue.size[0] > 0 and state[FOUND] < room:
        if done >= _STEP:
            return work, False
        count, key = pop(work.queue)
        row = find(work.pairs, key)
        now = work.pairs[row, COUNT]
        if now != count:
            if now >= least:
                push(work.queue, now, key)  # where the entry was that came out, so it never grows
            continue
        while state[TAKEN] < len(others) and others[state[TAKEN]] >= count:
            state[TAKEN] += 1
        if state[FOUND] + state[TAKEN] >= room:
            break
        places = take_places(work.nodes, work.pairs, row, state)
        work.pairs[row, COUNT] = 0
        for start in range(0, len(places), _BLOCK):
            work = _with_room(work, least)
            _replace(work, places[start : start + _BLOCK], key, base + state[FOUND])
        work = _settled(work, least)
        row = state[FOUND]
        work.found[row, 0], work.found[row, 1], work.found[row, 2] = key >> 32, key & 0xFFFFFFFF, count
        state[FOUND] += 1
        done += len(places)
    return work, True


@njit
def _next(symbols: Symbols, at: int) -> int:
    mark = np.int64(symbols[at + 1])
    return int(at - mark if mark < SEPARATOR else at + 1)


@njit
def _before(symbols: Symbols, at: int) -> int:
    """Where the token before this one begins, or -1."""
    mark = np.int64(symbols[at - 1])
    if mark == SEPARATOR:
        return -1
    return int(at - 1 if mark >= 0 else at + mark)


@njit
def _with_room(work: Work, least: int) -> Work:
    """Room for all that a block of places can add: two pairs and two places each."""
    symbols, words, weights, pairs, nodes, touched, queue, found, state = work
    more = 2 * _BLOCK
    if is_full(state[PAIRS] + more, pairs.shape[0]):
        pairs = _without_rare(pairs, more, state, least)
    if state[USED] + more > len(nodes.places):
        spare = np.empty_like(nodes.places)
        nodes = Nodes(np.concatenate((nodes.places, spare)), np.concatenate((nodes.following, spare)))
    if state[TOUCHED] + more > len(touched):
        touched = np.concatenate((touched, np.empty_like(touched)))
    return Work(symbols, words, weights, pairs, nodes, touched, queue, found, state)


@njit
def _without_rare(pairs: Table, more: int, state: Ints, least: int) -> Table:
    """The pairs that can still be merged, and those being made, in a table with room for `more`."""
    kept = 0
    for row in range(pairs.shape[0]):
        if pairs[row, 0] != EMPTY:
            kept += pairs[row, COUNT] >= least or pairs[row, HEAD] >= 0
    slots = FIRST
    while slots < 2 * (kept + more):
        slots *= 2
    other = np.full((slots, pairs.shape[1]), EMPTY, dtype=np.int64)
    for row in range(pairs.shape[0]):
        if pairs[row, 0] != EMPTY and (pairs[row, COUNT] >= least or pairs[row, HEAD] >= 0):
            other[find(other, pairs[row, 0])] = pairs[row]
    state[PAIRS] = kept
    return other


@njit
def _replace(work: Work, places: Places, key: int, new: int) -> None:
    """Put the new token in these places, from left to right."""
    symbols, words, weights, pairs = work.symbols, work.words, work.weights, work.pairs
    left, right = key >> 32, key & 0xFFFFFFFF
    for place in places:
        at = int(place)
        if symbols[at] != left:
            continue
        second = _next(symbols, at)
        if symbols[second] != right:
            continue
        end = _next(symbols, second)
        weight = weights[words[at]]
        before = _before(symbols, at)
        if before >= 0:
            _lose(pairs, key_of(symbols[before], left), weight)
            _gain(work, key_of(symbols[before], new), before, weight)
        symbols[second] = symbols[at + 1] = symbols[end - 1] = at - end
        symbols[at] = new
        if symbols[end] >= 0:
            _lose(pairs, key_of(right, symbols[end]), weight)
            _gain(work, key_of(new, symbols[end]), at, weight)


@njit
def _lose(pairs: Table, key: int, weight: int) -> None:
    """A pair occurs less often; if it is rare it may be forgotten already."""
    row = find(pairs, key)
    if pairs[row, 0] != EMPTY:
        pairs[row, COUNT] -= weight


@njit
def _gain(work: Work, key: int, place: int, weight: int) -> None:
    """A new pair occurs at a place."""
    pairs, touched, state = work.pairs, work.touched, work.state
    row = find(pairs, key)
    if pairs[row, 0] == EMPTY:
        add_pair(pairs, row, key, state)
        touched[state[TOUCHED]] = key
        state[TOUCHED] += 1
    pairs[row, COUNT] += weight
    append(work.nodes, pairs, row, place, state)


@njit
def _settled(work: Work, least: int) -> Work:
    """Queue what the merge made and is frequent enough; the places of the rest are forgotten."""
    symbols, words, weights, pairs, nodes, touched, queue, found, state = work
    for number in range(state[TOUCHED]):
        row = find(pairs, touched[number])
        if pairs[row, COUNT] >= least:
            queue = push(queue, pairs[row, COUNT], touched[number])
        else:
            forget_places(nodes, pairs, row, state)
    state[TOUCHED] = 0
    return Work(symbols, words, weights, pairs, nodes, touched, queue, found, state)
