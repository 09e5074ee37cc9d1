"""Exact byte-pair encoding of weighted chunks: the merges of `tokenizers`' BpeTrainer, in its order.

Enters: symbols in a row with a separator around every chunk. Leaves: rows (left, right, count, new).
A token that begins at i stands at symbols[i]; one of several places has minus its length at its second and
last place, and something negative in between, so that one can walk both ways.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from microlm.text.bpe.learn.chunks import SEPARATOR, Columns, Symbols
from microlm.text.bpe.learn.lists import (
    FREE,
    GROUPS,
    LEFT,
    NEW,
    NODES,
    NONE,
    PAIRS,
    RIGHT,
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
from microlm.text.bpe.learn.names import name, new_names
from microlm.text.bpe.learn.queue import Queue, new_queue, pop, push
from microlm.text.bpe.learn.table import EMPTY, FIRST, Table, find, is_full, resized
from microlm.text.compiled import njit

_BLOCK = 4096  # occurrences that are replaced before the tables are looked at again
_COUNT, _NEWEST = 1, 2  # columns of the pairs; 0 is the key


@njit
def learn(columns: Columns, base: int, room: int, least: int, others: Ints) -> NDArray[np.int64]:
    """Rows (left, right, count, new), new ≥ `base`, down to a count of `least`. The columns are used up.

    Ends when `room` is taken by new tokens and by those of `others` (counts, falling) that are as frequent.
    """
    symbols, weights = columns.symbols, columns.weights
    words = _words(columns)
    pairs, state = _count(symbols, words, weights)
    nodes, groups, queue = _queue_all(symbols, pairs, state, least)
    names = new_names(room)
    found, size = np.empty((room + 16, 4), dtype=np.int64), 0
    made, taken = np.int64(0), 0
    touched = new_touched(2 * _BLOCK)
    places = np.empty(_BLOCK, dtype=np.int32)
    while queue.size[0] > 0 and made < room:
        count, key, group = pop(queue)
        row = find(pairs, key)
        if pairs[row, _COUNT] != count:
            if pairs[row, _COUNT] >= least:
                queue = push(queue, pairs[row, _COUNT], key, group)
            continue
        while taken < len(others) and others[taken] >= count:
            taken += 1
        if made + taken >= room:
            break
        state[LEFT], state[RIGHT] = key >> 32, key & 0xFFFFFFFF
        names, new = name(names, made, base, state[LEFT], state[RIGHT])
        made = max(made, new + 1)
        state[NEW] = base + new
        if size == len(found):
            found = np.concatenate((found, np.empty_like(found)))
        found[size] = state[LEFT], state[RIGHT], count, state[NEW]
        size += 1
        if pairs[row, _NEWEST] == group:
            pairs[row, _NEWEST] = NONE
        places, many = unlink(nodes, groups, group, state, places)
        if groups.shared[group]:
            places = _all_of_words(symbols, words, columns.begins, places[:many], state)
            many = len(places)
        for start in range(0, many, _BLOCK):
            pairs, nodes, touched = _make_room(pairs, nodes, touched, state)
            part = places[start : min(start + _BLOCK, many)]
            _replace(symbols, words, weights, pairs, part, nodes, touched, state)
        groups, queue = _settle(pairs, nodes, groups, touched, queue, state, least)
    return found[:size]


@njit
def _words(columns: Columns) -> Places:
    """The chunk of every place."""
    words = np.empty(len(columns.symbols), dtype=np.int32)
    words[0] = NONE
    for word in range(len(columns.weights)):
        words[columns.begins[word] : columns.begins[word + 1]] = word
    return words


@njit
def _key(left: int, right: int) -> int:
    return int((np.int64(left) << np.int64(32)) | np.int64(right))


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
def _count(symbols: Symbols, words: Places, weights: Ints) -> tuple[Table, Ints]:
    """The pairs of all chunks (key, count, newest group), and the trainer's counters."""
    pairs, state = np.full((FIRST, 3), EMPTY, dtype=np.int64), np.zeros(8, dtype=np.int64)
    state[FREE] = NONE
    for at in range(len(symbols) - 1):
        if symbols[at] < 0 or symbols[at + 1] < 0:
            continue
        row = find(pairs, _key(symbols[at], symbols[at + 1]))
        if pairs[row, 0] == EMPTY:
            if is_full(state[PAIRS], pairs.shape[0]):
                pairs = resized(pairs, 2 * pairs.shape[0])
                row = find(pairs, _key(symbols[at], symbols[at + 1]))
            pairs[row] = _key(symbols[at], symbols[at + 1]), 0, NONE
            state[PAIRS] += 1
        pairs[row, _COUNT] += weights[words[at]]
    return pairs, state


@njit
def _queue_all(symbols: Symbols, pairs: Table, state: Ints, least: int) -> tuple[Nodes, Groups, Queue]:
    """A group and an entry for every pair that is frequent enough, and its places in order."""
    many = 0
    for row in range(pairs.shape[0]):
        many += pairs[row, 0] != EMPTY and pairs[row, _COUNT] >= least
    groups = Groups(
        np.full(many + 16, NONE, dtype=np.int32),
        np.full(many + 16, NONE, dtype=np.int32),
        np.zeros(many + 16, dtype=np.bool_),
    )
    queue = new_queue(many + 16)
    for row in range(pairs.shape[0]):
        if pairs[row, 0] != EMPTY and pairs[row, _COUNT] >= least:
            pairs[row, _NEWEST] = state[GROUPS]
            queue = push(queue, pairs[row, _COUNT], pairs[row, 0], state[GROUPS])
            state[GROUPS] += 1
    nodes = Nodes(np.empty(len(symbols) + 16, dtype=np.int32), np.empty(len(symbols) + 16, dtype=np.int32))
    for at in range(len(symbols) - 1):
        if symbols[at] >= 0 and symbols[at + 1] >= 0:
            group = pairs[find(pairs, _key(symbols[at], symbols[at + 1])), _NEWEST]
            if group >= 0:
                append(nodes, groups.head, groups.tail, group, at, state)
    return nodes, groups, queue


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
            if pairs[row, _COUNT] == 0 and pairs[row, _NEWEST] == NONE:
                continue
            alive += 1
    slots = FIRST
    while slots < 2 * (alive + more):
        slots *= 2
    other = np.full((slots, 3), EMPTY, dtype=np.int64)
    for row in range(pairs.shape[0]):
        if pairs[row, 0] == EMPTY or (pairs[row, _COUNT] == 0 and pairs[row, _NEWEST] == NONE):
            continue
        other[find(other, pairs[row, 0])] = pairs[row]
    state[PAIRS] = alive
    return other


@njit
def _replace(
    symbols: Symbols, words: Places, weights: Ints, pairs: Table, places: Places, nodes: Nodes,
    touched: Touched, state: Ints,
) -> None:  # fmt: skip
    """Put the new token in these places, from left to right; `tokenizers` leaves the pair's own count as it is."""
    left, right, new = state[LEFT], state[RIGHT], state[NEW]
    for place in places:
        at = np.int64(place)
        if symbols[at] != left:
            continue
        second = _next(symbols, at)
        if symbols[second] != right:
            continue
        end = _next(symbols, second)
        weight = weights[words[at]]
        before = _before(symbols, at)
        if before >= 0:
            pairs[find(pairs, _key(symbols[before], left)), _COUNT] -= weight
            _note(pairs, _key(symbols[before], new), before, weight, nodes, touched, state)
        symbols[second] = symbols[at + 1] = symbols[end - 1] = at - end
        symbols[at] = new
        if symbols[end] >= 0:
            pairs[find(pairs, _key(right, symbols[end])), _COUNT] -= weight
            _note(pairs, _key(new, symbols[end]), at, weight, nodes, touched, state)


@njit
def _note(
    pairs: Table, key: int, place: int, weight: int, nodes: Nodes, touched: Touched, state: Ints
) -> None:
    """Count a new occurrence, and note its place."""
    row = find(pairs, key)
    if pairs[row, 0] == EMPTY:
        pairs[row, 0], pairs[row, _COUNT], pairs[row, _NEWEST] = key, 0, NONE
        state[PAIRS] += 1
    pairs[row, _COUNT] += weight
    number = -2 - pairs[row, _NEWEST]  # a pair that is being touched has the number of that for a group
    if number < 0:
        number = state[TOUCHED]
        state[TOUCHED] = number + 1
        touched.keys[number] = key
        touched.head[number] = touched.tail[number] = NONE
        touched.earlier[number] = pairs[row, _NEWEST]
        pairs[row, _NEWEST] = -2 - number
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
        if pairs[row, _COUNT] < least:
            nodes.following[touched.tail[number]] = state[FREE]
            state[FREE] = touched.head[number]
            pairs[row, _NEWEST] = earlier if is_live else NONE
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
        pairs[row, _NEWEST] = group
        queue = push(queue, pairs[row, _COUNT], touched.keys[number], group)
    state[TOUCHED] = 0
    return groups, queue
