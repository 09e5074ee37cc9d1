"""Draws = a reference written with plain loops; the distribution is the model's."""

from __future__ import annotations

import pytest
import torch

from microlm.core.records import Sampling
from microlm.engine.sampling import RandomStream, draw, keep_likely


def reference(p: list[float], top_k: int, top_p: float) -> set[int]:
    """The ids that survive, by definition."""
    order = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    total, kept, mass = sum(p[i] for i in order), set(), 0.0
    for i in order:
        if kept and mass >= top_p * total:
            break
        kept.add(i)
        mass += p[i]
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 50, 999])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
def test_kept_tokens_equal_the_definition(top_k: int, top_p: float) -> None:
    p = torch.randn(4, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(2).softmax(-1)
    kept = keep_likely(p, [top_k] * 4, [top_p] * 4)
    for row in range(4):
        assert set(kept[row].nonzero().flatten().tolist()) == reference(p[row].tolist(), top_k, top_p)


def test_rows_with_different_settings_do_not_touch_each_other() -> None:
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    each = [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5, top_k=3),
        Sampling(temperature=2.0, top_p=0.3),
    ]
    for trial in range(50):
        together = draw(scores, each, [RandomStream(trial) for _ in each])
        alone = [draw(scores[i : i + 1], [s], [RandomStream(trial)])[0] for i, s in enumerate(each)]
        assert together == alone


def test_draws_follow_the_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0, float("-inf")]])
    stream, sampling, counts = RandomStream(3), Sampling(temperature=0.7), torch.zeros(5)
    for _ in range(4000):
        counts[draw(scores, [sampling], [stream])[0]] += 1
    expected = (scores[0] / 0.7).softmax(0)
    assert counts[4] == 0
    assert (counts / 4000 - expected).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [1e-30, 1e-9, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    scores = torch.randn(8, 100, generator=torch.Generator().manual_seed(4)) * 30
    got = draw(scores, [Sampling(temperature=temperature)] * 8, [RandomStream(i) for i in range(8)])
    assert got == scores.argmax(-1).tolist()
