"""DPO's loss and gradients are those of the formula by hand; its reference is that of the start, always."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import dpo_job, random_pairs, sides_of, some_rows
from safetensors.torch import load_file
from torch import Tensor
from training import add_lora, tiny_decoder, tiny_loop

from microlm.core.metrics import read_metrics
from microlm.core.recipe import Parallel
from microlm.model import directory, lora
from microlm.model.transformer import Decoder, causal_attend
from microlm.train.batches.pairs import PairRows
from microlm.train.job import Job
from microlm.train.loop import train
from microlm.train.objectives import Loss, dpo
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks, launch
from microlm.train.step import accumulate, losses, make_forward
from microlm.train.tuning.reference import FILE, add_references

ALONE = Ranks(0, 1)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def moved(decoder: Decoder, by: float = 0.1, seed: int = 1) -> Decoder:
    """The decoder as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in decoder.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * by)
    return decoder


def logp(decoder: Decoder, side: tuple[list[int], list[int]]) -> Tensor:
    """log p of the labelled tokens of one conversation, alone in a plain forward pass."""
    ids, mask = side
    hidden = decoder.hidden(torch.tensor([ids]), torch.arange(len(ids)), causal_attend)
    table = torch.log_softmax(decoder.lm_head(hidden[0]), dim=-1)
    learnt = [table[at, token] for at, (token, m) in enumerate(zip(ids[1:], mask[1:], strict=True)) if m]
    return torch.stack(learnt).sum()


def by_hand(
    policy: Decoder, reference: Decoder, pairs: list[int], beta: float, smoothing: float, share: float
) -> tuple[Tensor, dict[str, float]]:
    """The formula in float64, pair by pair, and the metrics as sums."""
    sides, total, told = (
        sides_of(random_pairs("chat", 0)),
        torch.zeros(()).double(),
        dict.fromkeys(dpo.METRICS, 0.0),
    )
    for pair in pairs:
        chosen, rejected = (logp(policy, sides[2 * pair + i]) for i in (0, 1))
        with torch.no_grad():
            first, second = (logp(reference, sides[2 * pair + i]).float().double() for i in (0, 1))
        margin = beta * ((chosen - first) - (rejected - second))
        total = total - (1 - smoothing) * torch.log(1 / (1 + torch.exp(-margin)))
        total = total - smoothing * torch.log(1 / (1 + torch.exp(margin)))
        total = total - share * chosen / sum(sides[2 * pair][1])
        better, worse = chosen.detach(), rejected.detach()
        rewards = (beta * (better - first), beta * (worse - second))
        values = map(float, (*rewards, margin.detach(), margin > 0, better, worse))
        told = {name: told[name] + value for name, value in zip(dpo.METRICS, values, strict=True)}
    return total, told


def in_dtype(dtype: torch.dtype, seed: int = 0) -> Decoder:
    decoder = moved(tiny_decoder(seed), 0.1, seed + 1).to(dtype)
    decoder.compute_dtype = dtype
    return decoder


def put_references(rows: PairRows, reference: Decoder) -> None:
    """Fill them one conversation at a time."""
    sides = sides_of(random_pairs("chat", 0))
    with torch.no_grad():
        values = torch.stack([logp(reference, side) for side in sides]).view(-1, 2)
    rows.references["chat"] = values.float()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize(("smoothing", "share"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1.0), (0.2, 0.3)])
def test_loss_and_gradients_are_the_formula(
    tmp_path: Path, dtype: torch.dtype, smoothing: float, share: float
) -> None:
    """Packed rows against conversations alone in float64; the smallest and largest gradients count alike."""
    rows, beta = some_rows(0), 0.7
    reference = in_dtype(torch.float64, seed=3)
    put_references(rows, reference)
    policy, exact = in_dtype(dtype), in_dtype(torch.float64)
    loop = tiny_loop(batch_rows=8, micro_rows=8, dtype="float32")
    with rows.batches(8) as stream:
        batch = next(stream)
    objective = dpo.make(beta, smoothing, share)
    found = losses(make_forward(policy, loop), policy, batch, objective)
    pairs = [pair for row in batch.samples for _, pair in row]
    assert objective.count(batch) == len(pairs) > 8
    total, told = by_hand(exact, reference, pairs, beta, smoothing, share)
    assert found.total.item() == pytest.approx(total.item(), rel=TOLERANCE[dtype])
    for name, value in zip(dpo.METRICS, found.sums, strict=True):
        assert float(value) == pytest.approx(told[name], rel=10 * TOLERANCE[dtype], abs=1e-5), name
    ours = torch.autograd.grad(found.total, list(policy.parameters()))
    theirs = torch.autograd.grad(total, list(exact.parameters()))
    scale = max(float(g.abs().max()) for g in theirs)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert float((ours_ - theirs_).abs().max()) <= TOLERANCE[dtype] * scale


def test_the_start_is_ln_2(tmp_path: Path) -> None:
    """Every pair lies in other company than when its reference was computed: in float32, 1e-6 apart."""
    decoder = moved(tiny_decoder())
    job = dpo_job(tmp_path, tiny_loop(batch_rows=8))
    add_references(ALONE, decoder, job, {})
    with job.train.batches(8) as stream:
        batch = next(stream)
    count = job.objective.count(batch)
    found = losses(make_forward(decoder, job.loop), decoder, batch, job.objective)
    assert found.total.item() / count == pytest.approx(math.log(2), abs=1e-6)
    assert abs(float(found.sums[dpo.METRICS.index("margin")])) / count < 3e-6


@pytest.mark.parametrize("micro_rows", [4, 3, 1])
def test_micro_batches_give_the_gradients_of_the_whole(tmp_path: Path, micro_rows: int) -> None:
    """(8 x 1) = (4 x 2) = (1 x 8), and 3 + 3 + 2: what is weighted are pairs."""
    found = []
    for size in (8, micro_rows):
        decoder = moved(tiny_decoder())
        job = dpo_job(tmp_path, tiny_loop(batch_rows=8, micro_rows=size))
        put_references(job.train, tiny_decoder(seed=4))  # type: ignore[arg-type]
        with job.train.batches(8) as stream:
            batch = next(stream)
        sums = accumulate(ALONE, make_forward(decoder, job.loop), decoder, batch, job, lambda: False)
        found.append((sums, [p.grad for p in decoder.parameters() if p.grad is not None]))
    (sums, whole), (others, split) = found
    assert torch.allclose(sums, others, rtol=1e-6)
    scale = max(float(g.abs().max()) for g in whole)
    for a, b in zip(whole, split, strict=True):
        assert float((a - b).abs().max()) <= 1e-6 * scale


def run_on_rank(ranks: Ranks, folder: Path, steps: int, adapter: bool = False) -> None:
    """References, training; rank 0 saves the weights."""
    decoder = moved(tiny_decoder())
    if adapter:
        add_lora(decoder)
    job = dpo_job(folder, tiny_loop(steps, batch_rows=8, micro_rows=4, log_steps=1, validation_steps=2))
    job.optim = OptimRecipe(matrix_lr=0.01, embedding_lr=0.003, head_lr=0.003, warmup_steps=1)
    add_references(ranks, decoder, job, {"of": "test"})
    if adapter:
        job.save_weights = lambda d, out: lora.save_adapter(d, out, "base", "digest")
    train(ranks, decoder, job)
    if ranks.rank == 0:
        job.save_weights(decoder, folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "logs/metrics.jsonl")


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(tmp_path: Path) -> None:
    """The reference too, bit for bit: a batch of rows gives the same numbers whoever computes it."""
    for size in (1, 2):
        launch(Parallel(processes=size, threads=1), run_on_rank, tmp_path / str(size), 4)
    one, two = (load_file(tmp_path / f"{size}/resume/{FILE}") for size in (1, 2))
    assert one.keys() == two.keys() == {"train/chat", "validation/chat"}
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = ((tmp_path / f"{size}/model.safetensors").read_bytes() for size in (1, 2))
    assert first == second  # two micro-batches: two summands commute
    assert [r.get("margin") for r in metrics(tmp_path / "1")] == [
        r.get("margin") for r in metrics(tmp_path / "2")
    ]


@pytest.mark.parametrize("adapter", [False, True], ids=["weights", "lora"])
def test_training_prefers_what_is_preferred(tmp_path: Path, adapter: bool) -> None:
    """Held-out accuracy and margin rise from chance; what is logged is what the objective names."""
    run_on_rank(ALONE, tmp_path, 30, adapter)
    told = [row for row in metrics(tmp_path) if "validation_margin" in row]
    assert told[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert told[0]["validation_margin"] == pytest.approx(0, abs=1e-5)
    assert told[-1]["validation_accuracy"] >= (0.6 if adapter else 0.9)  # tables that know nothing are frozen
    assert told[-1]["validation_margin"] > (0.2 if adapter else 0.5)
    assert metrics(tmp_path)[-1]["accuracy"] >= 0.9
    assert {f"validation_{name}" for name in dpo.METRICS} <= told[-1].keys()
    assert "bits_per_byte" not in told[-1]


def test_the_reference_is_read_again_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another decoder would give other numbers: the file counts, as long as it is made for the same."""
    job = dpo_job(tmp_path, tiny_loop())
    add_references(ALONE, moved(tiny_decoder()), job, {"model": 1})
    kept = {name: t.clone() for name, t in job.train.references.items()}  # type: ignore[attr-defined]
    assert all(bool(t.all()) for t in kept.values())
    again = dpo_job(tmp_path, tiny_loop())
    add_references(ALONE, tiny_decoder(seed=7), again, {"model": 1})
    assert all(torch.equal(again.train.references[n], t) for n, t in kept.items())  # type: ignore[attr-defined]
    other = dpo_job(tmp_path, tiny_loop())
    add_references(ALONE, tiny_decoder(seed=7), other, {"model": 2})
    assert not any(torch.equal(other.train.references[n], t) for n, t in kept.items())  # type: ignore[attr-defined]
    (tmp_path / "resume" / FILE).write_bytes(b"cut off")
    add_references(ALONE, moved(tiny_decoder()), dpo_job(tmp_path, tiny_loop()), {"model": 1})
    assert torch.equal(load_file(tmp_path / "resume" / FILE)["train/chat"], kept["chat"])


def test_the_reference_is_that_of_plain_forward_passes(tmp_path: Path) -> None:
    decoder, job = moved(tiny_decoder()), dpo_job(tmp_path, tiny_loop(micro_rows=3, batch_rows=4))
    add_references(ALONE, decoder, job, {})
    expected = [logp(decoder, side) for side in sides_of(random_pairs("chat", 0))]
    assert torch.allclose(job.train.references["chat"].flatten(), torch.stack(expected), atol=1e-5)  # type: ignore[attr-defined]


def test_resumed_equals_undisturbed(tmp_path: Path) -> None:
    """Cut off after a checkpoint, another process goes on: the weights say nothing of the start any more."""

    def run(folder: Path, fails_at: int = 0) -> Job:
        calls = 0
        objective = dpo.make(0.5)

        def loss(hidden: Tensor, decoder: Decoder, batch: Any) -> Loss:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise ZeroDivisionError
            return objective.loss(hidden, decoder, batch)

        decoder = moved(tiny_decoder())
        watched = dpo.Objective(loss, objective.metrics, objective.count, objective.nll)
        job = dpo_job(folder, tiny_loop(), objective=watched)
        add_references(ALONE, decoder, job, {})
        train(ALONE, decoder, job)
        directory.save(decoder, folder)
        return job

    run(tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "cut", fails_at=17)
    assert [p.name for p in (tmp_path / "cut/resume").glob("step-*")] == ["step-00000004"]
    run(tmp_path / "cut")
    whole, cut = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert whole == cut


def test_rows_without_labels_count_for_nothing(tmp_path: Path) -> None:
    """As a validation leaves them out; empty places of short rows neither."""
    rows = some_rows(0)
    put_references(rows, tiny_decoder(seed=5))
    decoder, objective = moved(tiny_decoder()), dpo.make(0.5, 0.1, 0.2)
    forward = make_forward(decoder, tiny_loop())
    with rows.batches(6) as stream:
        batch = next(stream)
    some, alone = batch.labelled(2), batch.rows(0, 2)
    assert objective.count(some) == objective.count(alone) == sum(len(row) for row in batch.samples[:2])
    first, second = (losses(forward, decoder, b, objective) for b in (some, alone))
    assert first.total.item() == pytest.approx(second.total.item(), rel=1e-6)
    assert [float(x) for x in first.sums] == pytest.approx([float(x) for x in second.sums], rel=1e-5)
