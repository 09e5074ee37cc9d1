"""Scores of many requests → one id each. Each draws from its own seeded generator: company changes nothing.

Shapes: n requests, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from microlm.core.errors import UserError
from microlm.core.records import Sampling

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


def check_sampling(s: Sampling) -> None:
    """Refuse settings that have no meaning, by name."""
    if not (math.isfinite(s.temperature) and s.temperature >= 0):
        raise UserError(f"temperature: {s.temperature} is not a number >= 0; 0 is greedy, 0.7 is usual")
    if not 0 < s.top_p <= 1:
        raise UserError(f"top_p: {s.top_p} is not in (0, 1]; 1 keeps every token")
    if s.top_k < 0:
        raise UserError(f"top_k: {s.top_k} is negative; 0 keeps every token")
    if s.max_tokens < 1:
        raise UserError(f"max_tokens: {s.max_tokens} is below 1; ask for at least one token")
    if s.seed is not None and not 0 <= s.seed < 2**63:
        raise UserError(f"seed: {s.seed} is not between 0 and 2^63 - 1; choose another")
    if any(not text for text in s.stop):
        raise UserError("stop: an empty string stops everything; leave it out")


def draw(scores: Tensor, samplings: Sequence[Sampling], randoms: Sequence[RandomStream | None]) -> list[int]:
    """One id per row of `scores` [n,V] (float32): the best one at temperature 0, else a random one."""
    ids: list[int] = scores.argmax(-1).tolist()
    rows = [i for i, s in enumerate(samplings) if s.temperature > 0]
    if rows:
        chosen = scores if len(rows) == len(ids) else scores[rows]
        uniforms = [r.next() for i in rows if (r := randoms[i]) is not None]
        for row, token in zip(
            rows, _draw_random(chosen, [samplings[i] for i in rows], uniforms), strict=True
        ):
            ids[row] = token
    return ids


def _draw_random(scores: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int]:
    """Inverse of the cumulative distribution in vocabulary order, in float64 against rounding."""
    device = scores.device
    temperature = torch.tensor([s.temperature for s in samplings], dtype=torch.float64, device=device)
    shifted = scores.double() - scores.amax(
        -1, keepdim=True
    )  # before the division, so that 1e-9 cannot overflow
    p = torch.softmax(shifted / temperature[:, None], dim=-1)
    if any(s.top_k or s.top_p < 1 for s in samplings):
        p = keep_likely(p, [s.top_k for s in samplings], [s.top_p for s in samplings])
    cumulative = p.cumsum(-1)
    target = torch.tensor(uniforms, dtype=torch.float64, device=device) * cumulative[:, -1]
    picked = torch.searchsorted(cumulative, target[:, None], right=True)
    return picked.squeeze(1).clamp_(max=scores.shape[1] - 1).tolist()


def keep_likely(p: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """`p` [n,V] with zeros outside the k most likely (0: all) and, of those, the smallest set of mass top_p.

    Ids exactly as likely as the last one kept are kept too.
    """
    size = p.shape[1]
    k = torch.tensor([min(x, size) or size for x in top_k], device=p.device)
    share = torch.tensor(top_p, dtype=p.dtype, device=p.device)
    ranked = p.sort(dim=-1, descending=True).values
    ranked = ranked.masked_fill(torch.arange(size, device=p.device) >= k[:, None], 0.0)
    before = ranked.cumsum(-1) - ranked
    kept = (before < share[:, None] * ranked.sum(-1, keepdim=True)).sum(-1).clamp_(min=1)
    kept = torch.minimum(torch.where(share < 1, kept, size), k)
    return p.masked_fill(p < ranked.gather(1, kept[:, None] - 1), 0.0)
