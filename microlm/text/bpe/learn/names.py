"""Tokens by what they are made of: two merges may give the same token, which then has one number."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from microlm.text.bpe.learn.lists import NONE, Ints, Places, longer
from microlm.text.bpe.learn.table import spread
from microlm.text.compiled import njit


class Names(NamedTuple):
    """Token t is parts[ends[t] : ends[t + 1]]; `slots` find it by that."""

    parts: Places
    ends: Ints
    slots: Places


@njit
def new_names(room: int) -> Names:
    """No tokens, and room for some."""
    slots = 16
    while slots < 2 * room:
        slots *= 2
    return Names(
        np.empty(1 << 12, dtype=np.int32),
        np.zeros(room + 1, dtype=np.int64),
        np.full(slots, NONE, dtype=np.int32),
    )


@njit
def name(names: Names, made: int, base: int, left: int, right: int) -> tuple[Names, int]:
    """The number of the token that two make, each a symbol below `base` or a token from there on.

    It is one that is there already, or `made`, how many there are.
    """
    names, end = _appended(names, names.ends[made], base, left)
    names, end = _appended(names, end, base, right)
    parts, ends, slots = names
    first = ends[made]
    hashed = np.uint64(0)
    for i in range(first, end):
        hashed = spread(hashed ^ np.uint64(parts[i]))
    at = int(np.int64(hashed >> np.uint64(1))) & (len(slots) - 1)
    while slots[at] >= 0:
        token = int(slots[at])
        same = 0
        if ends[token + 1] - ends[token] == end - first:
            while same < end - first and parts[ends[token] + same] == parts[first + same]:
                same += 1
        if same == end - first:
            return names, token
        at = (at + 1) & (len(slots) - 1)
    slots[at] = made
    ends[made + 1] = end
    return names, int(made)


@njit
def _appended(names: Names, end: int, base: int, token: int) -> tuple[Names, int]:
    """What a token is made of, written behind `end`: (names, the new end)."""
    parts, ends, slots = names
    begin, stop = 0, 1
    if token >= base:
        begin, stop = int(ends[token - base]), int(ends[token - base + 1])
    while end + stop - begin > len(parts):
        parts = longer(parts)
    if token < base:
        parts[end] = token
    else:
        parts[end : end + stop - begin] = parts[begin:stop]
    return Names(parts, ends, slots), end + stop - begin
