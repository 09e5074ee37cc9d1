"""How much a text repeats itself, measured over its tokens in linear time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microlm.text.compiled import njit
from microlm.text.rules.profile import DIGIT, HAN, HANGUL, LATIN, class_table, code_points

LONG, SHORT = 10, 4  # tokens of the runs that are looked for
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Repetition(NamedTuple):
    """Shares of a text's tokens; a character of East Asia is one, and so is a word."""

    tokens: int
    repeated: float  # in runs of 10 tokens that stood there before
    top: float  # in the run of 4 tokens that is the most frequent


def repetition(text: str) -> Repetition:
    """Measure the text."""
    tokens = _tokens(code_points(text), class_table())
    count = len(tokens)
    if count < LONG:
        return Repetition(count, 0.0, 0.0)
    return Repetition(count, _repeated(tokens) / count, min(1.0, SHORT * _most(tokens) / count))


def is_varied(text: str, max_repeated: float, max_top: float) -> bool:
    """Whether a quick look is enough to say that neither share of `repetition` is above its limit."""
    tokens = _tokens(code_points(text), class_table())
    count = len(tokens)
    if count < LONG:
        return True
    again = count - _distinct(tokens)
    # a token in a run that stood there before ends a run of 4 that did, but for the first 3 of LONG or more
    most = again * LONG / (LONG - SHORT + 1)
    return most <= max_repeated * count and SHORT * (again + 1) <= max_top * count


@njit
def _tokens(points: NDArray[np.uint32], table: NDArray[np.uint16]) -> NDArray[np.uint64]:
    """A hash of each token, in order."""
    found = np.empty(len(points), dtype=np.uint64)
    count = 0
    in_word = False
    for point in points:
        kind = table[point] & 15 if point < 65536 else (HAN if 0x20000 <= point < 0x32400 else 0)
        if HAN <= kind <= HANGUL:
            in_word = False
            found[count] = (np.uint64(point) + np.uint64(1)) * _BASE
            count += 1
        elif LATIN <= kind <= DIGIT:
            if not in_word:
                found[count] = np.uint64(0)
                count += 1
            in_word = True
            found[count - 1] = (found[count - 1] ^ np.uint64(point)) * np.uint64(0x100000001B3) + _BASE
        else:
            in_word = False
    return found[:count]


@njit
def _windows(tokens: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """A hash of each run of `size` tokens."""
    hashes = np.empty(len(tokens) - size + 1, dtype=np.uint64)
    power = np.uint64(1)
    for _ in range(size):
        power *= _BASE
    value = np.uint64(0)
    for i in range(len(tokens)):
        value = value * _BASE + (tokens[i] ^ (tokens[i] >> np.uint64(31)))
        if i >= size:
            value -= power * (tokens[i - size] ^ (tokens[i - size] >> np.uint64(31)))
        if i >= size - 1:
            hashes[i - size + 1] = (value ^ (value >> np.uint64(29))) | np.uint64(1)
    return hashes


@njit
def _distinct(tokens: NDArray[np.uint64]) -> int:
    """At least so many different runs of 4 there are: as many as bits that their hashes set."""
    hashes = _windows(tokens, SHORT)
    words = np.zeros(_table_size(len(hashes)) // 2, dtype=np.uint64)
    mask = np.uint64(len(words) - 1)
    found = 0
    for value in hashes:
        at = (value >> np.uint64(17)) & mask
        bit = np.uint64(1) << (value >> np.uint64(58))
        found += words[at] & bit == 0
        words[at] |= bit
    return found


@njit
def _slot(keys: NDArray[np.uint64], value: np.uint64) -> int:
    """Where the value stands in an open table (0 is free), or where it may be put."""
    mask = np.uint64(len(keys) - 1)
    at = (value >> np.uint64(17)) & mask
    while keys[at] != 0 and keys[at] != value:
        at = (at + np.uint64(1)) & mask
    return int(at)


@njit
def _table_size(count: int) -> int:
    size = 16
    while size < 2 * count:
        size *= 2
    return size


@njit
def _repeated(tokens: NDArray[np.uint64]) -> int:
    """The tokens in runs of 10 that stood there before."""
    hashes = _windows(tokens, LONG)
    keys = np.zeros(_table_size(len(hashes)), dtype=np.uint64)
    covered = end = 0
    for i in range(len(hashes)):
        at = _slot(keys, hashes[i])
        if keys[at] != 0:
            covered += i + LONG - max(i, end)
            end = i + LONG
        keys[at] = hashes[i]
    return covered


@njit
def _most(tokens: NDArray[np.uint64]) -> int:
    """How often the most frequent run of 4 stands there."""
    hashes = _windows(tokens, SHORT)
    keys = np.zeros(_table_size(len(hashes)), dtype=np.uint64)
    counts = np.zeros(len(keys), dtype=np.int64)
    most = 0
    for i in range(len(hashes)):
        at = _slot(keys, hashes[i])
        keys[at] = hashes[i]
        counts[at] += 1
        most = max(most, counts[at])
    return most
