"""The same draws for many rows at once by torch: where scores lie on a GPU, moving them would cost more.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from microlm.core.records import Sampling, TokenLogprob
from microlm.engine.sampling.draw import COLDEST
from microlm.engine.sampling.stream import RandomStream


def draw_rows(
    scores: Tensor, samplings: Sequence[Sampling], randoms: Sequence[RandomStream | None]
) -> list[int]:
    """One id per row of `scores` [n,V] (float32): the best one, with a stream a random one."""
    ids: list[int] = scores.argmax(-1).tolist()
    rows = [i for i, random in enumerate(randoms) if random is not None]
    if rows:
        chosen = scores if len(rows) == len(ids) else scores[rows]
        uniforms = [r.next() for r in randoms if r is not None]
        for row, token in zip(
            rows, _draw_random(chosen, [samplings[i] for i in rows], uniforms), strict=True
        ):
            ids[row] = token
    return ids


def logprob_rows(
    scores: Tensor, tokens: Sequence[int], counts: Sequence[int], vocab_size: int
) -> list[TokenLogprob]:
    """The log-probability of each row's token by `scores` [n,V], and its `counts` likeliest ids."""
    known = scores.double().log_softmax(-1)
    own = known.gather(1, torch.tensor(tokens, device=scores.device)[:, None]).squeeze(1).tolist()
    most = min(max(counts), vocab_size)
    values, ids = known[:, :vocab_size].topk(most, dim=-1)
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [
        TokenLogprob(token, value, tuple(top[:count]))
        for token, value, top, count in zip(tokens, own, tops, counts, strict=True)
    ]


def _draw_random(scores: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int]:
    """Inverse of the cumulative distribution in vocabulary order, in float64 against rounding."""
    temperature = _column([max(s.temperature, COLDEST) for s in samplings], scores)
    best = scores.amax(-1, keepdim=True)  # taken off before the division, so that 1e-30 cannot overflow
    weights = ((scores.double() - best) / temperature).exp()
    if any(s.top_k or s.top_p < 1 or s.min_p for s in samplings):
        weights = keep_likely(weights, samplings)
    cumulative = weights.cumsum(-1)
    target = _column(uniforms, scores) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, target, right=True)
    last_above_0 = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    found: list[int] = torch.minimum(picked, last_above_0).squeeze(1).tolist()
    return found


def keep_likely(weights: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """`weights` [n,V] with zeros outside what min-p, top-k and, of those, top-p leave.

    Ids exactly as likely as the last one kept are kept too.
    """
    size = weights.shape[1]
    least = _column([s.min_p for s in samplings], weights) * weights.amax(-1, keepdim=True)
    weights = weights.masked_fill(weights < least, 0.0)
    ranked = weights.sort(dim=-1, descending=True).values
    k = torch.tensor([min(s.top_k, size) or size for s in samplings], device=weights.device)[:, None]
    least = ranked.gather(1, k - 1)
    weights = weights.masked_fill(weights < least, 0.0)
    ranked = ranked.masked_fill(ranked < least, 0.0)
    share = _column([s.top_p for s in samplings], weights)
    wanted = share * ranked.sum(-1, keepdim=True)
    last = torch.searchsorted(ranked.cumsum(-1), wanted).clamp_(max=size - 1)
    least = torch.where(share < 1, ranked.gather(1, last), 0.0)
    return weights.masked_fill(weights < least, 0.0)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
