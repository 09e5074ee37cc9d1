"""The scores of one row → one id, in numpy: a row is drawn by itself, so that company changes nothing.

V: the vocabulary's size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from microlm.core.records import Sampling
from microlm.engine.sampling.stream import RandomStream

Scores = NDArray[np.float32]
Ids = NDArray[np.int64]
Weights = NDArray[np.float64]

COLDEST = 1e-30  # temperatures below it are it: the same draws, and no overflow
_HEAD = 256  # weights that are ranked first: nearly always they hold top_p of the mass


def draw_one(scores: Scores, sampling: Sampling, random: RandomStream | None) -> int:
    """The best id of `scores` [V] (at least one is finite, none is NaN), with a stream a random one.

    It is the inverse of the cumulative distribution, in the order of the ids.
    """
    if random is None:
        return int(scores.argmax())
    ids, weights = likely(scores, sampling)
    cumulative = weights.cumsum()
    total = cumulative[-1]
    place = int(cumulative.searchsorted(random.next() * total, side="right"))
    if place == len(cumulative):  # rounded up to the end, where weights may be 0
        place = int(cumulative.searchsorted(total))
    return place if ids is None else int(ids[place])


def likely(scores: Scores, sampling: Sampling) -> tuple[Ids | None, Weights]:
    """The ids that min-p, top-k and top-p leave (None: all), in order, and their weights; the best has 1.

    Top-p is a share of what the others leave. Ids exactly as likely as the last one kept are kept too.
    """
    best, size = scores.max(), len(scores)
    ids: Ids | None = None
    if 0 < sampling.top_k < size:
        ids = np.flatnonzero(scores >= np.partition(scores, size - sampling.top_k)[size - sampling.top_k])
        scores = scores[ids]
    weights = np.subtract(scores, best, dtype=np.float64)
    weights /= max(sampling.temperature, COLDEST)
    np.exp(weights, out=weights)
    least = sampling.min_p
    if sampling.top_p < 1:
        least = max(least, _least_of_nucleus(weights[weights >= least] if least else weights, sampling.top_p))
    if least > 0:
        kept = np.flatnonzero(weights >= least)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    return ids, weights


def _least_of_nucleus(weights: Weights, share: float) -> float:
    """The least weight of the smallest set, the likeliest first, that has `share` of the mass."""
    wanted, size = share * weights.sum(), len(weights)
    if size > _HEAD:
        head = np.sort(np.partition(weights, size - _HEAD)[size - _HEAD :])[::-1]
        mass = head.cumsum()
        if mass[-1] >= wanted:
            return float(head[mass.searchsorted(wanted)])
    ranked = np.sort(weights)[::-1]
    return float(ranked[min(int(ranked.cumsum().searchsorted(wanted)), size - 1)])
