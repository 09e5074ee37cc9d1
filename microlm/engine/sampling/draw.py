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
_BINS, _BINS_OF_1 = 512, 8  # of the weights' logarithms: 64 nats, eight bins a nat


def draw(scores: Scores, sampling: Sampling, random: RandomStream | None) -> int:
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
    best, size, k = scores.max(), len(scores), sampling.top_k
    ids: Ids | None = None
    if 0 < k < size:
        ids = np.flatnonzero(scores >= np.partition(scores, size - k)[size - k])
        scores = scores[ids]
    powers = np.subtract(scores, best, dtype=np.float64)
    powers /= max(sampling.temperature, COLDEST)
    weights = np.exp(powers)
    if sampling.min_p > 0:
        kept = np.flatnonzero(weights >= sampling.min_p)
        ids, powers, weights = (kept if ids is None else ids[kept]), powers[kept], weights[kept]
    if sampling.top_p < 1:
        kept = np.flatnonzero(weights >= _least_of_nucleus(powers, weights, sampling.top_p))
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    return ids, weights


def _least_of_nucleus(powers: Weights, weights: Weights, share: float) -> float:
    """The least weight of the smallest set, the likeliest first, that has `share` of the mass.

    `powers` are the logarithms of `weights`: only the weights in whose bin of them it lies are put in order.
    """
    bins = np.minimum(powers * -_BINS_OF_1, _BINS - 1).astype(np.int64)
    mass = np.bincount(bins, weights).cumsum()
    wanted = share * mass[-1]
    place = int(mass.searchsorted(wanted))
    ranked = np.sort(weights[bins == place])[::-1]
    before = mass[place - 1] if place else 0.0
    return float(ranked[min(int(ranked.cumsum().searchsorted(wanted - before)), len(ranked) - 1)])
