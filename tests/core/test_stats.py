"""Intervals against closed forms and known values."""

import itertools
import math

import numpy as np
import pytest

from microlm.core.stats import (
    bootstrap_ci,
    f1_difference_ci,
    micro_f1_ci,
    paired_test,
    proportion_ci,
    ratio_ci,
)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (6, 40, 0.0706, 0.2907)],
)
def test_wilson_equals_published_values(k: int, n: int, low: float, high: float) -> None:
    found = proportion_ci(k, n)
    assert found.value == k / n
    assert found.low == pytest.approx(low, abs=1e-4) and found.high == pytest.approx(high, abs=1e-4)


def test_bootstrap_of_the_mean_is_near_the_normal_interval() -> None:
    values = [math.sin(i * 12.9898) for i in range(400)]
    mean = sum(values) / 400
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 400) / 20
    found = bootstrap_ci(values)
    assert found.value == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=error * 0.2)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=error * 0.2)
    assert bootstrap_ci(values) == found != bootstrap_ci(values, seed=1)


def test_constant_samples_have_a_point_interval() -> None:
    assert bootstrap_ci([0.5] * 7) == (0.5, 0.5, 0.5)
    assert ratio_ci([(3, 2), (6, 4)]) == (1.5, 1.5, 1.5)
    assert micro_f1_ci([(1, 1, 1)] * 3) == (1.0, 1.0, 1.0)
    assert micro_f1_ci([(0, 0, 0)]) == (0.0, 0.0, 0.0)


def test_micro_f1_equals_precision_and_recall_by_hand() -> None:
    counts = [(2, 3, 4), (0, 1, 0), (5, 5, 6)]
    precision, recall = 7 / 9, 7 / 10
    found = micro_f1_ci(counts)
    assert found.value == pytest.approx(2 * precision * recall / (precision + recall))
    assert found.low <= found.value <= found.high


def test_paired_test_equals_enumeration() -> None:
    a, b = [1.0, 0.5, 0.9, 0.3, 0.8, 0.8], [0.6, 0.7, 0.1, 0.3, 0.2, 0.4]
    d = [x - y for x, y in zip(a, b, strict=True)]
    signs = list(itertools.product((1, -1), repeat=6))
    at_least = [s for s in signs if abs(sum(x * y for x, y in zip(s, d, strict=True))) >= abs(sum(d)) - 1e-9]
    found = paired_test(a, b)
    assert found.p_value == pytest.approx(len(at_least) / len(signs))
    assert found.difference == pytest.approx(sum(d) / 6)


def test_paired_test_of_hits_is_mcnemars_exact_test() -> None:
    a, b = [1] * 8 + [0] * 2 + [1] * 20, [0] * 8 + [1] * 2 + [1] * 20
    binomial = 2 * sum(math.comb(10, i) for i in range(3)) / 2**10
    assert paired_test(a, b).p_value == pytest.approx(binomial)
    many = paired_test(a * 3, b * 3).p_value  # 30 differing items: sampled
    exact = 2 * sum(math.comb(30, i) for i in range(7)) / 2**30
    assert many == pytest.approx(exact, abs=0.003)
    assert paired_test([1, 0], [1, 0]).p_value == 1.0


def test_empty_samples_are_refused() -> None:
    for call in (
        lambda: bootstrap_ci([]), lambda: micro_f1_ci([]), lambda: proportion_ci(0, 0),
        lambda: proportion_ci(3, 2), lambda: paired_test([], []), lambda: paired_test([1], [1, 2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"empty|needs"):
            call()


def test_a_difference_of_f1_is_paired() -> None:
    rng = np.random.default_rng(1)
    b = [(int(m), 4, 4) for m in rng.integers(0, 4, 60)]
    a = [(m + int(rng.random() < 0.4), 4, 4) for m, _, _ in b]
    found = f1_difference_ci(a, b)
    expected = micro_f1_ci(a).value - micro_f1_ci(b).value
    assert math.isclose(found.value, expected) and found.low < found.value < found.high
    by_hand = []
    draws = np.random.default_rng(7)
    for _ in range(2000):
        chosen = draws.integers(0, 60, 60)
        by_hand.append(sum(a[i][0] - b[i][0] for i in chosen) / 240)
    assert np.allclose(np.quantile(by_hand, [0.025, 0.975]), [found.low, found.high], atol=0.01)
    apart = micro_f1_ci(a).high - micro_f1_ci(a).low
    assert found.high - found.low < apart  # the same items are hard for both
    assert f1_difference_ci(b, b) == (0, 0, 0)
