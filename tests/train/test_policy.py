"""The policy gradient equals one written out in float64, answer by answer; and it teaches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from answering import answering_job, make_rows, recipe
from tiny_model import write_tiny_model
from torch import Tensor
from training import VOCAB, tiny_decoder

from microlm.core.records import Conversation
from microlm.model import directory
from microlm.model.transformer import Decoder, causal_attend
from microlm.train.batches.answers import Answer, Judge, advantages, pack
from microlm.train.batches.prompts import Prompt
from microlm.train.batches.rollouts import RolloutRows
from microlm.train.job import LoopRecipe
from microlm.train.loop import train
from microlm.train.objectives import policy
from microlm.train.ranks import Ranks
from microlm.train.step import losses, make_forward
from microlm.train.tuning.scorers import Scores

TEMPERATURE, CLIP, KL_WEIGHT = 0.7, 0.1, 0.3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", window=64)


def random_answers(seed: int, count: int) -> list[Answer]:
    """Prompts of 2 to 6 ids with four answers of 1 to 7 each, and what some engine thought of them."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        if i % 4 == 0:
            prompt = Prompt(Conversation(()), tuple(rng.integers(3, VOCAB, rng.integers(2, 7)).tolist()), "")
        ids = tuple(rng.integers(3, VOCAB, rng.integers(1, 8)).tolist())
        logprobs = tuple(rng.normal(-3, 1, len(ids)).tolist())
        made.append(Answer(prompt, ids, logprobs, (float(rng.random()),), False))
    return made


def double(seed: int) -> Decoder:
    decoder = tiny_decoder(seed).double()
    decoder.compute_dtype = torch.float64
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).double(), alpha=0.2)
    return decoder


def answer_logprobs(decoder: Decoder, answer: Answer, temperature: float) -> Tensor:
    """log p of each id of an answer, alone in its row."""
    sequence = torch.tensor([answer.prompt.ids + answer.ids])
    hidden = decoder.hidden(sequence[:, :-1], torch.arange(sequence.shape[1] - 1), causal_attend)
    scores = torch.log_softmax((hidden @ decoder.lm_head.weight.T)[0] / temperature, dim=-1)
    first = len(answer.prompt.ids) - 1
    return scores[first:].gather(1, torch.tensor(answer.ids)[:, None])[:, 0]


def by_hand(
    decoders: tuple[Decoder, Decoder, Decoder], answers: list[Answer], advantage: list[float], per: str
) -> dict[str, Tensor]:
    """The mean over tokens or answers of -min(r A, clip(r) A) + β (e^(ref-new) - (ref-new) - 1)."""
    tokens = sum(len(a.ids) for a in answers)
    loss = clipped = kl = torch.zeros((), dtype=torch.float64)
    for answer, gain in zip(answers, advantage, strict=True):
        share = 1 / tokens if per == "token" else 1 / len(answers) / len(answer.ids)
        n, o, s = (answer_logprobs(d, answer, TEMPERATURE) for d in decoders)
        for t in range(len(answer.ids)):
            ratio = (n[t] - o[t].detach()).exp()
            bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
            apart = s[t].detach() - n[t]
            divergence = apart.exp() - apart - 1
            best = torch.min(ratio * gain, bounded * gain)
            clipped = clipped + share * float(best < ratio * gain)
            kl = kl + share * divergence.detach()
            loss = loss + share * (KL_WEIGHT * divergence - best)
    return {"loss": loss, "clipped": clipped, "kl": kl}


@pytest.mark.parametrize("per", ["token", "answer"])
def test_it_equals_a_reference_in_float64(per: str) -> None:
    answers = random_answers(1, 8)
    old, new, start = double(1), double(1), double(2)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)).double(), alpha=0.02)
    found, _ = advantages(np.array([a.rewards[0] for a in answers]), 4, "std")
    tokens = sum(len(a.ids) for a in answers)
    weights = np.array([len(answers) / tokens if per == "token" else 1 / len(a.ids) for a in answers])
    batch = pack(answers, {"advantage": found, "weight": weights}, np.zeros((8, 0)), (32, 2))
    loop = LoopRecipe(context=32, micro_rows=2, dtype="float32", compile=False)
    alone = Ranks(0, 1)
    scores = {
        "old": Scores(old, loop, alone, TEMPERATURE)(batch),
        "raw": Scores(old, loop, alone, 1.0)(batch),
        "reference": Scores(start, loop, alone, TEMPERATURE)(batch),
    }
    exact = replace(batch, extras=batch.extras | scores)
    objective = policy.make(policy.Policy(CLIP, KL_WEIGHT, TEMPERATURE), ())
    forward = make_forward(new, loop)
    sums = [0.0] * 5
    for row in range(0, len(exact.labels), 2):
        loss = losses(forward, new, exact.rows(row, row + 2), objective)
        (loss.total / objective.count(exact)).backward()
        sums = [a + float(b) / 8 for a, b in zip(sums, (loss.total.detach(), *loss.sums), strict=True)]
    gradients = [p.grad.clone() for p in new.parameters() if p.grad is not None]
    for p in new.parameters():
        p.grad = None
    expected = by_hand((new, old, start), answers, found.tolist(), per)
    expected["loss"].backward()
    told = dict(zip(("loss", *objective.metrics), sums, strict=True))
    for name in ("loss", "clipped", "kl"):
        assert math.isclose(told[name], float(expected[name].detach()), rel_tol=1e-9), name
    assert told["clipped"] > 0.05 and told["kl"] > 0.01
    for ours, p in zip(gradients, new.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(ours, p.grad, rtol=1e-7, atol=1e-12)
    raw = torch.cat([answer_logprobs(old, a, 1.0) for a in answers])
    share = np.concatenate([np.full(len(a.ids), w / 8) for a, w in zip(answers, weights, strict=True)])
    engine = torch.tensor([x for a in answers for x in a.logprobs], dtype=torch.float64)
    gap = float((raw.detach() - engine).abs() @ torch.tensor(share))
    assert math.isclose(told["rollout_gap"], gap, rel_tol=1e-9)
    assert math.isclose(told["entropy"], -float(raw.detach() @ torch.tensor(share)), rel_tol=1e-9)


def test_advantages_by_hand() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    found, flat = advantages(rewards, 4, "std")
    assert found.tolist() == [1, -1, -1, 1, 0, 0, 0, 0]
    assert flat.tolist() == [False] * 4 + [True] * 4
    found, _ = advantages(np.array([1.0, 0.25, 0.25, 0.5]), 4, "mean")
    assert found.tolist() == [0.5, -0.25, -0.25, 0.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_ratio_is_exactly_one_at_the_first_update(model: Path, dtype: str, temperature: float) -> None:
    asked = recipe(answers={"updates": 2, "temperature": temperature}, loop={"dtype": dtype}, kl_weight=0.1)
    decoder = directory.load(model, asked.loop.compute_dtype())
    rows = make_rows(model, decoder, asked, Ranks(0, 1))
    batch = next(rows.batches(4))
    forward = make_forward(decoder, asked.sized)
    for start in range(0, len(batch.labels), 2):
        piece = batch.rows(start, start + 2)
        hidden = forward(piece.input_ids, piece.positions, forward.seen(piece))
        now = policy.tempered(hidden, decoder, piece, temperature)
        assert torch.equal(now, piece.extras["old"])
        assert torch.equal(now, piece.extras["reference"])


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_without_advantage_nothing_moves(tmp_path: Path, model: Path, matrices: str) -> None:
    asked = recipe(steps=2)
    decoder, job = answering_job(tmp_path, model, asked, Ranks(0, 1))
    job.optim = job.optim.model_copy(update={"matrices": matrices})
    rows = job.train
    assert isinstance(rows, RolloutRows)
    judges = {"half": Judge(1.0, lambda prompt, answer: 0.5)}
    rows.respondent = replace(rows.respondent, judges=judges)
    before = [p.detach().clone() for p in decoder.parameters()]
    at = train(Ranks(0, 1), decoder, job)
    assert [row["flat_groups"] for row in at.history] == [1.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.parameters(), strict=True))


def test_a_model_learns_to_say_one_letter(tmp_path: Path, model: Path) -> None:
    asked = recipe(
        steps=25,
        answers={"prompts": 4, "group": 8},
        kl_weight=0.001,
        loop={"micro_rows": 8, "checkpoint_steps": 99},
    )
    decoder, job = answering_job(tmp_path, model, asked, Ranks(0, 1))
    at = train(Ranks(0, 1), decoder, job)
    rewards = [row["reward"] for row in at.history]
    assert rewards[0] < 0.2 and min(rewards[-3:]) > 0.95, rewards
    assert at.history[0]["kl"] == 0 < at.history[-1]["kl"]
    assert max(row["rollout_gap"] for row in at.history) < 1e-5  # both in float32
