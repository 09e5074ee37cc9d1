"""Exact byte-pair encoding of weighted chunks: the merges of `tokenizers`' BpeTrainer, in its order.

Enters: symbols in a row with a separator around every chunk. Leaves: rows (left, right, count, new).
A token that begins at i stands at symbols[i]; one of several places has minus its length at its second and
last place, and something negative in between, so that one can walk both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from microlm.text.bpe.learn.chunks import SEPARATOR, Columns, Symbols
from microlm.text.bpe.learn.initial import COUNT, NEWEST, count_pairs, pair_of, queue_all, words_of
from microlm.text.bpe.learn.lists import (
    FOUND,
    FREE,
    GROUPS,
    LEFT,
    MADE,
    NEW,
    NODES,
    NONE,
    PAIRS,
    RIGHT,
    TAKEN,
    TOUCHED,
    Groups,
    Ints,
    Nodes,
    Places,
    Touched,
    append,
    longer,
    new_touched,
    unlink,
)
from microlm.text.bpe.learn.names import Names, name, new_names
from microlm.text.bpe.learn.queue import Queue, pop, push
from microlm.text.bpe.learn.table import EMPTY, FIRST, Table, find, is_full
from microlm.text.compiled import njit

_BLOCK = 4096  # occurrences that are replaced before the tables are looked at again
_STEP = 1 << 20  # and before Python looks whether someone wants to stop


class Work(NamedTuple):
    """All that learning goes on with from one step to the next."""

    symbols: Symbols
    words: Places
    begins: Ints
    weights: Ints
    pairs: Table
    nodes: Nodes
    groups: Groups
    touched: Touched
    queue: Queue
    names: Names
    found: Ints
    state: Ints


def learn(
    columns: Columns, base: int, room: int, least: int, others: Ints, step: Callable[[int], None]
) -> Ints:
    """Rows (left, right, count, new), new ≥ `base`, down to a count of `least`. The columns are used up.

    Ends when `room` is taken by new tokens and by those of `others` (counts, falling) that are as frequent.
    `step` hears how many rows there are, often enough to be stopped there.
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
    nodes, groups, queue = queue_all(columns.symbols, pairs, state, least)
    return Work(
        columns.symbols,
        words,
        columns.begins,
        columns.weights,
        pairs,
        nodes,
        groups,
        new_touched(2 * _BLOCK),
        queue,
        new_names(room),
        np.empty((room + 16, 4), dtype=np.int64),
        state,
    )


@njit
def _advance(work: Work, base: int, room: int, least: int, others: Ints) -> tuple[Work, bool]:
    """Merge until about a million places are replaced: (work, whether it is finished)."""
    symbols, words, begins, weights, pairs, nodes, groups, touched, queue, names, found, state = work
    done, is_done = 0, True
    while queue.size[0] > 0 and state[MADE] < room:
        if done >= _STEP:
            is_done = False
            break
        count, key, group = pop(queue)
        row = find(pairs, key)
        if pairs[row, COUNT] != count:
            if pairs[row, COUNT] >= least:
                queue = push(queue, pairs[row, COUNT], key, group)
            continue
        while state[TAKEN] < len(others) and others[state[TAKEN]] >= count:
            state[TAKEN] += 1
        if state[MADE] + state[TAKEN] >= room:
            break
        if pairs[row, NEWEST] == group:
            pairs[row, NEWEST] = NONE
        names, found = _enter(names, found, state, base, key, count)
        places = unlink(nodes, groups, group, state)
        if groups.shared[group]:
            places = _all_of_words(symbols, words, begins, places, state)
        for start in range(0, len(places), _BLOCK):
            pairs, nodes, touched = _make_room(pairs, nodes, touched, state)
            _replace(symbols, words, weights, pairs, places[start : start + _BLOCK], nodes, touched, state)
        groups, queue = _settle(pairs, nodes, groups, touched, queue, state, least)
        done += len(places)
    work = Work(symbols, words, begins, weights, pairs, nodes, groups, touched, queue, names, found, state)
    return work, is_done


@njit
def _enter(names: Names, found: Ints, state: Ints, base: int, key: int, count: int) -> tuple[Names, Ints]:
    """Note the merge that is to come, and give it its token."""
    state[LEFT], state[RIGHT] = key >> 32, key & 0xFFFFFFFF
    names, new = name(names, state[MADE], base, state[LEFT], state[RIGHT])
    state[MADE] = max(state[MADE], new + 1)
    state[NEW] = base + new
    if state[FOUND] == len(found):
        found = np.concatenate((found, np.empty_like(found)))
    row = found[state[FOUND]]
    row[0], row[1], row[2], row[3] = state[LEFT], state[RIGHT], count, state[NEW]
    state[FOUND] += 1
    return names, found


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
def _all_of_words(symbols: Symbols, words: Places, begins: Ints, places: Places, state: Ints) -> Places:
    """All places of the pair in the chunks of these places, as `tokenizers` takes the group of a pair."""
    chosen = np.unique(words[places])
    many = 0
    for word in chosen:
        many += begins[word + 1] - 1 - begins[word]
    found = np.empty(many, dtype=np.int32)
    many = 0
    for word in chosen:
        at = begins[word]
        while symbols[at] != SEPARATOR:
            following = _next(symbols, at)
            if symbols[at] == state[LEFT] and symbols[following] == state[RIGHT]:
                found[many] = at
                many += 1
            at = following
    return found[:many]


@njit
def _make_room(pairs: Table, nodes: Nodes, touched: Touched, state: Ints) -> tuple[Table, Nodes, Touched]:
    """Room for all that a block of occurrences can add: two pairs and two places each."""
    more = 2 * _BLOCK
    if is_full(state[PAIRS] + more, pairs.shape[0]):
        pairs = _without_dead(pairs, more, state)
    if state[NODES] + more > len(nodes.places):
        nodes = Nodes(longer(nodes.places), longer(nodes.following))
    if state[TOUCHED] + more > len(touched.keys):
        bigger = new_touched(2 * len(touched.keys) + more)
        many = state[TOUCHED]
        bigger.keys[:many] = touched.keys[:many]
        bigger.head[:many] = touched.head[:many]
        bigger.tail[:many] = touched.tail[:many]
        bigger.earlier[:many] = touched.earlier[:many]
        touched = bigger
    return pairs, nodes, touched


@njit
def _without_dead(pairs: Table, more: int, state: Ints) -> Table:
    """The pairs that occur or are queued, in a table with room for `more`."""
    alive = 0
    for row in range(pairs.shape[0]):
        if pairs[row, 0] != EMPTY:
            if pairs[row, COUNT] == 0 and pairs[row, NEWEST] == NONE:
                continue
            alive += 1
    slots = FIRST
    while slots < 2 * (alive + more):
        slots *= 2
    other = np.full((slots, 3), EMPTY, dtype=np.int64)
    for row in range(pairs.shape[0]):
        if pairs[row, 0] == EMPTY or (pairs[row, COUNT] == 0 and pairs[row, NEWEST] == NONE):
            continue
        other[find(other, pairs[row, 0])] = pairs[row]
    state[PAIRS] = alive
    return other


@njit
def _replace(
    symbols: Symbols, words: Places, weights: Ints, pairs: Table, places: Places, nodes: Nodes,
    touched: Touched, state: Ints,
) -> None:  # fmt: skip
    """Put the new token in these places, from left to right; the pair keeps its count, as in `tokenizers`."""
    left, right, new = state[LEFT], state[RIGHT], state[NEW]
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
            pairs[find(pairs, pair_of(symbols[before], left)), COUNT] -= weight
            _note(pairs, pair_of(symbols[before], new), before, weight, nodes, touched, state)
        symbols[second] = symbols[at + 1] = symbols[end - 1] = at - end
        symbols[at] = new
        if symbols[end] >= 0:
            pairs[find(pairs, pair_of(right, symbols[end])), COUNT] -= weight
            _note(pairs, pair_of(new, symbols[end]), at, weight, nodes, touched, state)


@njit
def _note(
    pairs: Table, key: int, place: int, weight: int, nodes: Nodes, touched: Touched, state: Ints
) -> None:
    """Count a new occurrence, and note its place."""
    row = find(pairs, key)
    if pairs[row, 0] == EMPTY:
        pairs[row, 0], pairs[row, COUNT], pairs[row, NEWEST] = key, 0, NONE
        state[PAIRS] += 1
    pairs[row, COUNT] += weight
    number = -2 - pairs[row, NEWEST]  # a pair that is being touched has the number of that for a group
    if number < 0:
        number = state[TOUCHED]
        state[TOUCHED] = number + 1
        touched.keys[number] = key
        touched.head[number] = touched.tail[number] = NONE
        touched.earlier[number] = pairs[row, NEWEST]
        pairs[row, NEWEST] = -2 - number
    append(nodes, touched.head, touched.tail, number, place, state)


@njit
def _settle(
    pairs: Table, nodes: Nodes, groups: Groups, touched: Touched, queue: Queue, state: Ints, least: int
) -> tuple[Groups, Queue]:
    """Queue what the merge made and is frequent enough; the places of the rest are forgotten."""
    for number in range(state[TOUCHED]):
        row = find(pairs, touched.keys[number])
        earlier = touched.earlier[number]
        is_live = earlier >= 0 and groups.head[earlier] >= 0
        if pairs[row, COUNT] < least:
            nodes.following[touched.tail[number]] = state[FREE]
            state[FREE] = touched.head[number]
            pairs[row, NEWEST] = earlier if is_live else NONE
            continue
        group = state[GROUPS]
        if group == len(groups.head):
            shared = np.zeros(2 * group, dtype=np.bool_)
            shared[:group] = groups.shared
            groups = Groups(longer(groups.head), longer(groups.tail), shared)
        groups.head[group], groups.tail[group] = touched.head[number], touched.tail[number]
        groups.shared[group] = is_live
        if is_live:
            groups.shared[earlier] = True
        state[GROUPS] = group + 1
        pairs[row, NEWEST] = group
        queue = push(queue, pairs[row, COUNT], touched.keys[number], group)
    state[TOUCHED] = 0
    return groups, queue
