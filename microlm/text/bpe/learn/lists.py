"""What the trainer remembers of pairs: lists of the places where they begin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microlm.text.compiled import njit

Ints = NDArray[np.int64]
Places = NDArray[np.int32]

NONE = -1
COUNTERS = 11
LEFT, RIGHT, NEW, PAIRS, FREE, NODES, TOUCHED, GROUPS, MADE, TAKEN, FOUND = range(COUNTERS)
"""The trainer's counters: the present merge; pairs in the table; the first free node, how many nodes, touched
pairs and groups there are; tokens made, others taken, rows found."""


class Nodes(NamedTuple):
    """Linked lists of places where a pair began when it was noted; it may be gone since."""

    places: Places
    following: Places


class Groups(NamedTuple):
    """The places of a pair that one merge made, as `tokenizers` queues them; `shared`: it has others."""

    head: Places
    tail: Places
    shared: NDArray[np.bool_]


class Touched(NamedTuple):
    """Pairs that the present merge makes, with their places; `earlier` is the pair's newest group before."""

    keys: Ints
    head: Places
    tail: Places
    earlier: Ints


@njit
def longer(array: Places) -> Places:
    longer = np.empty(2 * len(array), dtype=np.int32)
    longer[: len(array)] = array
    return longer


@njit
def append(nodes: Nodes, head: Places, tail: Places, number: int, place: int, state: Ints) -> None:
    """Put a place at the end of a list; there is a free node."""
    node = state[FREE]
    if node >= 0:
        state[FREE] = nodes.following[node]
    else:
        node = state[NODES]
        state[NODES] = node + 1
    nodes.places[node] = place
    nodes.following[node] = NONE
    if head[number] >= 0:
        nodes.following[tail[number]] = node
    else:
        head[number] = node
    tail[number] = node


@njit
def unlink(nodes: Nodes, groups: Groups, group: int, state: Ints) -> Places:
    """Take the places of a group, in order; its nodes are free again."""
    places, many = np.empty(1 << 8, dtype=np.int32), 0
    node = np.int64(groups.head[group])
    while node >= 0:
        if many == len(places):
            places = longer(places)
        places[many] = nodes.places[node]
        many += 1
        node = np.int64(nodes.following[node])
    if many:
        nodes.following[groups.tail[group]] = state[FREE]
        state[FREE] = groups.head[group]
    groups.head[group] = groups.tail[group] = NONE
    return places[:many]


@njit
def new_touched(size: int) -> Touched:
    return Touched(
        np.empty(size, dtype=np.int64),
        np.empty(size, dtype=np.int32),
        np.empty(size, dtype=np.int32),
        np.empty(size, dtype=np.int64),
    )
