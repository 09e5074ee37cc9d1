"""Compiled loops over groups of candidates and a forest of clusters. Enters, leaves: arrays of numbers.

A forest is `parent` [N]: a document's parent is itself or one of lower rank, so a cluster's root is its best.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from microlm.text.compiled import njit
from microlm.text.near.kernels import BINS, Hashes, Signatures, mix

Documents = NDArray[np.uint32]
Numbers = NDArray[np.int64]

FAN = 64
"""A member of a group is compared with its 64 best and the 64 before it: with all, up to 129 members."""
ROW, PARTNER, LOOKED_AT, REJECTED = range(4)
"""What `Numbers` of `candidates` hold: where to go on, and two counts of pairs."""


@njit
def find(parent: Documents, document: int) -> int:
    """The root of a document; paths are halved on the way."""
    while parent[document] != document:
        parent[document] = parent[parent[document]]
        document = parent[document]
    return document


@njit
def roots(parent: Documents, documents: Documents) -> Documents:
    """The root of each."""
    found = np.empty(len(documents), dtype=np.uint32)
    for i in range(len(documents)):
        found[i] = find(parent, documents[i])
    return found


@njit
def forest(ends: Numbers, count: int) -> NDArray[np.bool_]:
    """Which of the edges [P, 2] between `count` clusters join two that no edge before has joined."""
    parent = np.arange(count).astype(np.uint32)
    chosen = np.zeros(len(ends), dtype=np.bool_)
    for i in range(len(ends)):
        a, b = find(parent, ends[i, 0]), find(parent, ends[i, 1])
        chosen[i] = a != b
        parent[max(a, b)] = min(a, b)
    return chosen


@njit
def pair_key(one: np.uint64, other: np.uint64) -> np.uint64:
    """A number for two ranks in any order, never 0."""
    return mix(max(one, other) + mix(min(one, other))) | np.uint64(1)


@njit
def equal_values(a: Signatures, b: Signatures) -> int:
    """In how many places two signatures agree."""
    equal = 0
    for k in range(BINS):
        equal += a[k] == b[k]
    return equal


@njit
def candidates(
    rows: tuple[Numbers, Documents, Numbers],
    signatures: Signatures,
    ranks: Hashes,
    parent: Documents,
    differ: Hashes,
    least: int,
    numbers: Numbers,
    out: Documents,
) -> int:
    """Write pairs [P, 2] worth an exact comparison into `out`; stops when it is full, `numbers` says where.

    rows: the first row of each row's group, its document, its place in `signatures`; in a group by rank. Left
    out are pairs of one cluster, pairs in the table `differ`, pairs with fewer than `least` equal values.
    """
    first, documents, places = rows
    found = 0
    while numbers[ROW] < len(first):
        i = numbers[ROW]
        tail = max(first[i] + FAN, i - FAN)  # the first of the members before it that are not among the best
        partners = min(FAN, i - first[i]) + max(0, i - tail)
        while numbers[PARTNER] < partners:
            if found == len(out):
                return found
            k = numbers[PARTNER]
            j = first[i] + k if k < FAN else tail + k - FAN
            numbers[PARTNER] += 1
            if find(parent, documents[i]) == find(parent, documents[j]):
                continue
            numbers[LOOKED_AT] += 1
            if equal_values(signatures[places[i]], signatures[places[j]]) < least:
                numbers[REJECTED] += 1
                continue
            key = pair_key(ranks[documents[i]], ranks[documents[j]])
            if differ[key & np.uint64(len(differ) - 1)] != key:
                out[found, 0], out[found, 1] = documents[j], documents[i]
                found += 1
        numbers[ROW], numbers[PARTNER] = i + 1, 0
    return found


@njit
def settle(
    pairs: Documents, alike: NDArray[np.bool_], ranks: Hashes, parent: Documents, differ: Hashes
) -> None:
    """Join the clusters of the pairs [P, 2] that are alike; write the others into the table `differ`."""
    for i in range(len(pairs)):
        if alike[i]:
            a, b = find(parent, pairs[i, 0]), find(parent, pairs[i, 1])
            if ranks[a] < ranks[b] or (ranks[a] == ranks[b] and a < b):
                parent[b] = a
            else:
                parent[a] = b
        else:
            key = pair_key(ranks[pairs[i, 0]], ranks[pairs[i, 1]])
            differ[key & np.uint64(len(differ) - 1)] = key
