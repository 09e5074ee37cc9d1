"""Intervals and tests for scores. Enters: one number per item. Leaves: estimate, low, high; or a p-value.

Intervals are 95 % unless `level` says otherwise; equal numbers and seed give an equal interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 2000
_CHUNK = 2_000_000
_EXACT_UP_TO = 16  # 2^16 sign patterns are still counted one by one


class Interval(NamedTuple):
    """An estimate and its interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """Mean of a - b with its interval, and the two-sided p-value that there is no difference."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_ci(values: Sequence[float], seed: int = 0, level: float = 0.95) -> Interval:
    """The mean of `values` (one per item) with a percentile bootstrap interval over items."""
    return _bootstrap([[float(v)] for v in values], lambda sums, n: sums[:, 0] / n, seed, level)


def ratio_ci(pairs: Sequence[tuple[float, float]], seed: int = 0, level: float = 0.95) -> Interval:
    """Sum of numerators / sum of denominators (bits per byte, say) with a bootstrap interval over items."""
    return _bootstrap([list(p) for p in pairs], lambda sums, n: _divide(sums[:, 0], sums[:, 1]), seed, level)


def micro_f1_ci(counts: Sequence[tuple[int, int, int]], seed: int = 0, level: float = 0.95) -> Interval:
    """Micro-F1 of (true positives, predicted, gold) per item, with a bootstrap interval over items.

    F1 = 2·tp / (predicted + gold); 0 when nothing is predicted and nothing is gold.
    """

    def f1(sums: Array, n: int) -> Array:
        return _divide(2 * sums[:, 0], sums[:, 1] + sums[:, 2])

    return _bootstrap([list(c) for c in counts], f1, seed, level)


def f1_difference_ci(
    a: Sequence[tuple[int, int, int]], b: Sequence[tuple[int, int, int]], seed: int = 0, level: float = 0.95
) -> Interval:
    """Micro-F1 of system a less that of b, with a bootstrap interval over the items that both answered."""

    def difference(sums: Array, n: int) -> Array:
        first, second = (_divide(2 * sums[:, i], sums[:, i + 1] + sums[:, i + 2]) for i in (0, 3))
        return first - second

    pairs = zip(a, b, strict=True)
    return _bootstrap([[*map(float, x), *map(float, y)] for x, y in pairs], difference, seed, level)


def proportion_ci(k: int, n: int, level: float = 0.95) -> Interval:
    """k of n with Wilson's interval (Wilson 1927), which is right for small n and for k = 0 and k = n."""
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"a proportion needs 0 <= k <= n and n > 0, got k={k}, n={n}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = k / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(
        share, 0.0 if k == 0 else max(0.0, middle - half), 1.0 if k == n else min(1.0, middle + half)
    )


def paired_test(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Paired:
    """Compare two systems on the same items: a sign-flip permutation test of the mean difference a - b.

    Exact with up to 16 differing items, else 10,000 random flips. For 0/1 scores it is McNemar's exact test.
    """
    import numpy as np

    if len(a) != len(b) or not a:
        raise ValueError(
            f"a paired test needs two non-empty samples of equal length, got {len(a)} and {len(b)}"
        )
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    value, low, high = bootstrap_ci(differences.tolist(), seed)
    moved = differences[differences != 0]
    observed = abs(moved.sum()) - 1e-9
    if len(moved) <= _EXACT_UP_TO:
        patterns = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        p = float((abs((1 - 2 * patterns) @ moved) >= observed).mean())
    else:
        flips = np.random.default_rng(seed).integers(0, 2, (10_000, len(moved))) * 2 - 1
        p = (1 + int((abs(flips @ moved) >= observed).sum())) / 10_001
    return Paired(value, low, high, p)


def _bootstrap(
    rows: Sequence[Sequence[float]], statistic: Callable[[Array, int], Array], seed: int, level: float
) -> Interval:
    """`statistic(sums [R, C], items)` of the column sums, over resampled items."""
    import numpy as np

    if not rows:
        raise ValueError("an empty sample has no interval; report null")
    table = np.asarray(rows, dtype=np.float64)
    n, rng = len(table), np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)  # resamples that are drawn together: memory stays bounded
    sums = np.concatenate(
        [_resampled(table, rng, min(chunk, RESAMPLES - i)) for i in range(0, RESAMPLES, chunk)]
    )
    low, high = np.quantile(statistic(sums, n), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(table.sum(axis=0)[None], n)[0]), float(low), float(high))


def _resampled(table: Array, rng: np.random.Generator, times: int) -> Array:
    """The column sums of `times` resamples: how often each item is drawn, times its row."""
    import numpy as np

    n = len(table)
    drawn = rng.integers(0, n, (times, n)) + n * np.arange(times)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=times * n).reshape(times, n)
    sums: Array = counts.astype(np.float64) @ table
    return sums


def _divide(a: Array, b: Array) -> Array:
    import numpy as np

    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)
