"""A seeded order of 0 … n-1 that can be entered anywhere: each number is computed, none is stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from microlm.core import runtime

ROUNDS = 6


class Order:
    """A permutation of `count` numbers: a Feistel network over the next power of four, walked until inside.

    Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002. Fewer than four walks on average.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self._half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
        self._low = np.uint64((1 << int(self._half)) - 1)
        self._keys = [np.uint64(runtime.derive_seed(seed, "round", i)) for i in range(ROUNDS)]

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """The numbers at places `start` to `stop`, exclusive."""
        numbers = self._spread(np.arange(start, min(stop, self.count), dtype=np.uint64))
        while (outside := numbers >= np.uint64(self.count)).any():
            numbers[outside] = self._spread(numbers[outside])
        return numbers.astype(np.int64)

    def _spread(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._low
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._low)
        return (left << self._half) | right


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The end of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
