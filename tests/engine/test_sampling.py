"""Draws = definitions written with plain loops, penalties = vLLM's formulas, log-probabilities = torch's."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from microlm.core.errors import UserError
from microlm.core.records import Sampling
from microlm.engine.sampling import Penalties, RandomStream, check_sampling, draw, of_prompt, token_logprob
from microlm.engine.sampling.device import draw_rows, keep_likely, logprob_rows
from microlm.engine.sampling.draw import likely

SETTINGS = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in product((0.7, 1.0, 3.0), (0, 1, 3, 50, 999), (1.0, 0.95, 0.5, 1e-9), (0.0, 0.02, 0.3))
]


def scores_of(rows: int, size: int = 400, seed: int = 1, ties: bool = False) -> Tensor:
    """Random scores; with ties, many ids are equally likely."""
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3
    return x.round() if ties else x


def survivors(scores: list[float], s: Sampling) -> set[int]:
    """The ids that are kept, by definition; who is as likely as the last one kept is kept too."""
    weights = [float(np.exp((x - max(scores)) / s.temperature)) for x in scores]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = [i for i in order if weights[i] >= s.min_p]
    if s.top_k:
        kept = [i for i in kept if weights[i] >= weights[kept[: s.top_k][-1]]]
    total, mass, last = sum(weights[i] for i in kept), 0.0, 0.0
    for i in kept:
        last, mass = weights[i], mass + weights[i]
        if mass >= s.top_p * total * (1 - 1e-12):
            break
    return {i for i in kept if weights[i] >= last} if s.top_p < 1 else set(kept)


@pytest.mark.parametrize("ties", [False, True])
def test_kept_tokens_equal_the_definition(ties: bool) -> None:
    scores = scores_of(3, ties=ties)
    for s in SETTINGS:
        for row in scores:
            ids, weights = likely(row.numpy(), s)
            found = set(range(len(row))) if ids is None else set(ids.tolist())
            assert found == survivors(row.tolist(), s), s
            assert len(found) == len(weights)


@pytest.mark.parametrize("ties", [False, True])
def test_rows_on_a_device_are_drawn_like_rows_one_by_one(ties: bool) -> None:
    """The device's way runs on any device: here on the CPU."""
    scores = scores_of(len(SETTINGS), ties=ties)
    weights = ((scores - scores.amax(-1, keepdim=True)).double() / 0.7).exp()
    for row, kept in enumerate(keep_likely(weights, [s for s in SETTINGS if s.temperature == 0.7] * 3)):
        s = SETTINGS[row % (len(SETTINGS) // 3)]
        assert set(kept.nonzero().flatten().tolist()) == survivors(scores[row].tolist(), s)
    for trial in range(5):
        streams: list[Any] = [RandomStream(trial * 1000 + i) for i in range(len(SETTINGS))]
        together = draw_rows(scores, SETTINGS, [*streams[:-1], None])
        again = [*(RandomStream(trial * 1000 + i) for i in range(len(SETTINGS) - 1)), None]
        assert together == [draw(x, s, r) for x, s, r in zip(scores.numpy(), SETTINGS, again, strict=True)]


def test_draws_follow_the_softmax() -> None:
    scores = np.array([0.0, 1.0, 2.0, -1.0, -np.inf], np.float32)
    stream, sampling, counts = RandomStream(3), Sampling(temperature=0.7), np.zeros(5)
    for _ in range(20000):
        counts[draw(scores, sampling, stream)] += 1
    expected = torch.tensor(scores / 0.7).softmax(0).numpy()
    assert counts[4] == 0
    assert abs(counts / 20000 - expected).max() < 0.015


def test_equal_seeds_draw_equally_and_a_draw_takes_one_number() -> None:
    scores = scores_of(1)[0].numpy()
    first, second, other = RandomStream(5), RandomStream(5), RandomStream(6)
    drawn = [draw(scores, Sampling(temperature=1.0), first) for _ in range(100)]
    assert [draw(scores, Sampling(temperature=1.0, top_p=0.999999), second) for _ in range(100)] == drawn
    assert [draw(scores, Sampling(temperature=1.0), other) for _ in range(100)] != drawn
    assert first.next() == second.next()


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-9, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    scores, sampling = scores_of(8, 100) * 10, Sampling(temperature=temperature, top_p=0.9)
    best = scores.argmax(-1).tolist()
    assert [draw(x, sampling, RandomStream(i)) for i, x in enumerate(scores.numpy())] == best
    assert draw_rows(scores, [sampling] * 8, [RandomStream(i) for i in range(8)]) == best


def test_a_number_close_to_one_never_draws_what_is_forbidden() -> None:
    class Last(RandomStream):
        def next(self) -> float:
            return 1.0  # what the largest number, times the mass, may be rounded to

    scores = np.full(50, -np.inf, np.float32)
    scores[3:20] = np.linspace(-3, 4, 17)
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=0.3, top_k=40)):
        assert draw(scores, sampling, Last(0)) == 19
        assert draw_rows(torch.from_numpy(scores)[None], [sampling], [Last(0)]) == [19]


def vllm_penalties(logits: Tensor, prompt: list[int], output: list[int], s: Sampling) -> Tensor:
    """`apply_penalties` of vllm/model_executor/layers/utils.py, after its logit bias."""
    logits = logits.clone()
    for token, bias in s.logit_bias:
        logits[token] += bias
    counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=len(logits))
    in_prompt = torch.bincount(torch.tensor(prompt), minlength=len(logits)) > 0
    penalties = torch.where(in_prompt | (counts > 0), s.repetition_penalty, 1.0)
    logits *= torch.where(logits > 0, 1.0 / penalties, penalties)
    logits -= s.frequency_penalty * counts
    return logits - s.presence_penalty * (counts > 0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.3),
        Sampling(repetition_penalty=0.5),
        Sampling(presence_penalty=1.5),
        Sampling(frequency_penalty=-0.7),
        Sampling(logit_bias=((3, 50.0), (7, -100.0), (3, 1.5))),
        Sampling(
            repetition_penalty=1.2,
            presence_penalty=-2,
            frequency_penalty=0.4,
            logit_bias=((0, 9.0), (11, -9.0)),
        ),
    ],
)
def test_penalties_equal_vllms_formulas(sampling: Sampling) -> None:
    prompt, output = [1, 2, 2, 3, 399], [3, 5, 5, 5, 7, 11]
    penalties = Penalties.of(sampling, prompt, 400)
    assert penalties is not None
    for step, scores in enumerate(scores_of(len(output) + 1)):
        before = scores.clone()
        expected = vllm_penalties(scores, prompt, output[:step], sampling)
        assert torch.allclose(
            torch.from_numpy(penalties.apply(scores.numpy())), expected, atol=1e-5, rtol=1e-6
        )
        assert torch.equal(scores, before)
        if step < len(output):
            penalties.add(output[step])


def test_without_penalties_there_are_none() -> None:
    assert Penalties.of(Sampling(temperature=1.0, top_k=3), [1], 10) is None


@pytest.mark.parametrize("count", [0, 1, 5, 390, 1000])
def test_log_probabilities_equal_torch(count: int) -> None:
    """The head has 400 rows, of which the tokenizer knows 390: those are listed."""
    for scores in scores_of(3):
        exact = scores.double().log_softmax(-1)
        known = token_logprob(scores.numpy(), 17, count, 390)
        assert known.token_id == 17 and abs(known.logprob - float(exact[17])) < 1e-12
        values, ids = exact[:390].sort(descending=True, stable=True)
        assert [i for i, _ in known.top] == ids[:count].tolist()
        assert torch.allclose(torch.tensor([v for _, v in known.top]).double(), values[:count], atol=1e-6)
    rows = scores_of(3)
    found = logprob_rows(rows, [1, 2, 3], [count, 0, 2], 390)
    for j, (a, n) in enumerate(zip(found, (count, 0, 2), strict=True)):
        b = token_logprob(rows[j].numpy(), j + 1, n, 390)
        assert [i for i, _ in a.top] == [i for i, _ in b.top]
        assert abs(a.logprob - b.logprob) < 1e-9


def test_equally_likely_tokens_are_listed_by_id() -> None:
    scores = np.array([1, 2, 2, 2, 0], np.float32)
    assert [i for i, _ in token_logprob(scores, 0, 2, 5).top] == [1, 2]


def test_prompt_log_probabilities_come_chunk_by_chunk() -> None:
    ids, logits = [5, 9, 2, 7, 7], scores_of(5)
    request: Any = SimpleNamespace(prompt_logprobs=[None], sampling=Sampling(prompt_logprobs=1))
    of_prompt(request, ids[1:3], logits[:2], 400)
    of_prompt(request, ids[3:], logits[2:4], 400)
    exact = logits.double().log_softmax(-1)
    assert request.prompt_logprobs[0] is None
    for place, known in enumerate(request.prompt_logprobs[1:]):
        assert known.token_id == ids[place + 1]
        assert abs(known.logprob - float(exact[place, ids[place + 1]])) < 1e-12
        assert [i for i, _ in known.top] == [int(exact[place].argmax())]


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(temperature=-1), "temperature"),
        (Sampling(temperature=float("nan")), "temperature"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_p=float("nan")), "top_p"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(min_p=1.1), "min_p"),
        (Sampling(min_p=float("nan")), "min_p"),
        (Sampling(max_tokens=0), "max_tokens"),
        (Sampling(seed=-1), "seed"),
        (Sampling(seed=2**64), "seed"),
        (Sampling(stop=("",)), "stop"),
        (Sampling(n=0), "n: 0"),
        (Sampling(n=10**6), "n: 1000000"),
        (Sampling(logprobs=-1), "logprobs"),
        (Sampling(prompt_logprobs=10**6), "prompt_logprobs"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty"),
        (Sampling(repetition_penalty=float("inf")), "repetition_penalty"),
        (Sampling(presence_penalty=2.1), "presence_penalty"),
        (Sampling(frequency_penalty=float("nan")), "frequency_penalty"),
        (Sampling(logit_bias=((400, 1.0),)), "no token has the id 400"),
        (Sampling(logit_bias=((-1, 1.0),)), "no token has the id -1"),
        (Sampling(logit_bias=((1, float("nan")),)), "logit_bias"),
        (Sampling(logit_bias=((1, -101.0),)), "logit_bias"),
    ],
)
def test_a_setting_without_meaning_is_named(sampling: Sampling, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_sampling(sampling, 400)


def test_every_setting_with_a_meaning_passes() -> None:
    check_sampling(
        Sampling(
            1, 2.0, 1.0, 10**9, 2**63 - 1, ("x",), min_p=1.0, repetition_penalty=2.0, presence_penalty=-2.0,
            frequency_penalty=2.0, logit_bias=((399, -100.0),), logprobs=100, prompt_logprobs=0, n=8,
        ),
        400,
    )  # fmt: skip
