"""Uniform numbers of one request: from its own seed, in the order of its tokens, whoever runs beside it."""

from __future__ import annotations

import torch

_BLOCK = 32  # uniform numbers drawn from a generator at once


class RandomStream:
    """Uniform numbers in [0, 1) from one generator; no seed means a fresh one."""

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._block: list[float] = []

    def next(self) -> float:
        """The next number."""
        if not self._block:
            self._block = torch.rand(_BLOCK, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._block.pop()
