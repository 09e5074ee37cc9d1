"""Distillation is its definition; without the teacher `next_token`; from itself a student learns nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import CONTEXT, VOCAB, make_job, random_set, tiny_decoder, tiny_loop, train_on_rank

from microlm.core.metrics import read_metrics
from microlm.model import directory
from microlm.model.transformer import Decoder
from microlm.train import objectives
from microlm.train.batches import IGNORE, Batch, PackedRows
from microlm.train.loop import train
from microlm.train.objectives import cross_entropy, distil
from microlm.train.objectives.distil import METRICS, Mix, Teacher
from microlm.train.ranks import Ranks
from microlm.train.tuning.distil import load_teacher

KERNELS = [
    pytest.param(torch.float32, False, id="float32"),
    pytest.param(torch.float64, False, id="float64"),
    pytest.param(torch.float32, True, id="compiled", marks=pytest.mark.slow),
]


def drawn(dtype: torch.dtype = torch.float32, share: float = 0.6) -> tuple[Tensor, Tensor, Batch]:
    """Hidden states of a student (32 wide) and a teacher (24 wide), and a batch with labels on a share."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(VOCAB, (9, CONTEXT), generator=generator) for _ in range(2))
    labels[torch.rand(9, CONTEXT, generator=generator) >= share] = IGNORE
    hidden = torch.randn(9, CONTEXT, 32, generator=generator, dtype=dtype).requires_grad_()
    return hidden, torch.randn(9, CONTEXT, 24, generator=generator, dtype=dtype), Batch(ids, labels, ids * 0)


def head(size: int = VOCAB, width: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(1), dtype=dtype) * 0.3


def by_hand(logits: Tensor, taught: Tensor, labels: Tensor, mix: Mix) -> tuple[Tensor, list[float]]:
    """Position by position, from the definition; float64 in, float64 out."""
    total, sums = logits.new_zeros(()), [0.0, 0.0, 0.0]
    for x, t, label in zip(logits, taught, labels.tolist(), strict=True):
        if label == IGNORE:
            continue
        ce = -torch.log(torch.exp(x) / torch.exp(x).sum())[label]
        hot = torch.exp(t / mix.temperature)
        if mix.top_k:
            hot = torch.where(hot >= hot.sort(descending=True).values[mix.top_k - 1], hot, 0.0)
        p = hot / hot.sum()
        q = torch.exp(x / mix.temperature) / torch.exp(x / mix.temperature).sum()
        kl = sum((p[i] * torch.log(p[i] / q[i]) for i in range(len(p)) if p[i] > 0), logits.new_zeros(()))
        total = total + (1 - mix.alpha) * ce + mix.alpha * mix.temperature**2 * kl
        same = float(x.argmax() == t.argmax())
        sums = [a + b for a, b in zip(sums, (ce.item(), kl.item(), same), strict=True)]
    return total, sums


@pytest.mark.parametrize(("dtype", "compiled"), KERNELS)
@pytest.mark.parametrize(
    "mix", [Mix(0.5, 1.0), Mix(0.3, 2.0), Mix(1.0, 4.0, 5)], ids=["half", "warm", "top-5"]
)
def test_loss_and_gradients_are_the_definition(
    mix: Mix, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks that do not divide the positions; a float64 student against float64, within 1e-12."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 100)
    decoder = tiny_decoder().to(dtype)
    hidden, taught, batch = drawn(dtype)
    teacher_head = head(dtype=dtype)
    objective = distil.make(Teacher(lambda _: taught, teacher_head), mix, compiled)
    found = objective.loss(hidden, decoder, batch)
    weight = decoder.lm_head.weight
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = leaves[0].flatten(0, 1) @ leaves[1].mT
    labels = batch.labels.flatten()
    total, sums = by_hand(logits, (taught.flatten(0, 1) @ teacher_head.mT).double(), labels, mix)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert found.total.item() == pytest.approx(total.item(), rel=tolerance)
    assert [s.item() for s in found.sums] == pytest.approx(sums, rel=10 * tolerance)
    assert not any(s.requires_grad for s in found.sums)
    exact = torch.autograd.grad(total, leaves)
    for ours, theirs in zip(torch.autograd.grad(found.total, (hidden, weight)), exact, strict=True):
        assert float((ours - theirs).abs().max()) <= 5 * tolerance * float(theirs.abs().max())
    assert objective.count(batch) == batch.label_count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_without_the_teachers_share_it_is_next_token_bit_for_bit(dtype: torch.dtype) -> None:
    decoder = tiny_decoder()
    hidden, taught, batch = drawn(dtype)
    objective = distil.make(Teacher(lambda _: taught, head(dtype=dtype)), Mix(0.0, 2.0), compiled=False)
    found, plain = objective.loss(hidden, decoder, batch), objectives.next_token(hidden, decoder, batch)
    assert torch.equal(found.total, plain)
    leaves = (hidden, decoder.lm_head.weight)
    both = zip(torch.autograd.grad(found.total, leaves), torch.autograd.grad(plain, leaves), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    assert torch.equal(found.sums[METRICS.index("ce")], plain)


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    decoder = tiny_decoder()
    hidden, _, batch = drawn()
    itself = Teacher(lambda _: hidden.detach(), decoder.lm_head.weight.detach())
    found = distil.make(itself, Mix(1.0, 3.0), compiled=False).loss(hidden, decoder, batch)
    assert abs(found.total.item()) < 1e-4 and abs(found.sums[1].item()) < 1e-5
    assert found.sums[2].item() == batch.label_count
    for gradient in torch.autograd.grad(found.total, (hidden, decoder.lm_head.weight)):
        assert float(gradient.abs().max()) < 1e-5


@pytest.mark.parametrize("size", [VOCAB - 10, VOCAB + 10])
def test_tables_of_another_length_speak_of_the_tokens_they_share(size: int) -> None:
    """The ends of tables stand for no token: a shorter teacher gives them nothing, a longer one's are cut."""
    decoder, mix = tiny_decoder(), Mix(1.0, 1.0)
    hidden, taught, batch = drawn()
    long = head(VOCAB + 10)
    found = distil.make(Teacher(lambda _: taught, long[:size]), mix, False).loss(hidden, decoder, batch)
    logits = taught @ long[:VOCAB].mT
    logits[..., size:] = -1e30
    labels = batch.labels.flatten()
    x = (hidden.detach() @ decoder.lm_head.weight.detach().mT).flatten(0, 1)
    total, _ = by_hand(x.double(), logits.flatten(0, 1).double(), labels, mix)
    assert found.total.item() == pytest.approx(total.item(), rel=1e-5)


def distilled(folder: Path, teacher: Path, mix: Mix, steps: int, **fields: Any) -> tuple[Decoder, list[Any]]:
    """A tiny student after some steps, and its rows of metrics."""
    loop = tiny_loop(steps, log_steps=1, **fields)
    objective = distil.make(load_teacher(loop, teacher), mix, compiled=False)
    decoder = tiny_decoder(seed=9, num_hidden_layers=1)
    train(Ranks(0, 1), decoder, make_job(folder, loop, objective=objective))
    return decoder, read_metrics(folder / "logs/metrics.jsonl")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after 120 steps."""
    folder = tmp_path_factory.mktemp("teacher")
    train_on_rank(Ranks(0, 1), folder, tiny_loop(120, checkpoint_steps=1000))
    return folder


def test_a_student_comes_close_to_its_teacher(tmp_path: Path, teacher: Path) -> None:
    """KL falls and agreement rises on held-out rows; bits per byte are the labels' cross-entropy."""
    before = {n: p.detach().clone() for n, p in directory.load(teacher).named_parameters()}
    _, rows = distilled(tmp_path, teacher, Mix(1.0, 1.0), 60)
    told = [row for row in rows if "validation_kl" in row]
    assert told[-1]["validation_kl"] < 0.5 * told[0]["validation_kl"]
    assert told[-1]["validation_agreement"] > told[0]["validation_agreement"] + 0.2
    assert told[-1]["validation_loss"] == pytest.approx(told[-1]["validation_kl"], rel=1e-6)
    after = dict(directory.load(teacher).named_parameters())
    assert all(torch.equal(before[n], after[n].detach()) for n in before)


def test_with_alpha_0_the_run_is_a_plain_run(tmp_path: Path, teacher: Path) -> None:
    """The whole step, the clipping and the optimizer included: the same bytes."""
    student, _ = distilled(tmp_path / "a", teacher, Mix(0.0, 1.0), 6)
    plain = tiny_decoder(seed=9, num_hidden_layers=1)
    train(Ranks(0, 1), plain, make_job(tmp_path / "b", tiny_loop(6, log_steps=1)))
    ours, theirs = dict(student.named_parameters()), dict(plain.named_parameters())
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_conversations_are_compared_at_their_labels_only(tmp_path: Path, teacher: Path) -> None:
    talks = PackedRows({"chat": random_set("chat", 3, conversations=True)}, {}, CONTEXT, 0)
    loop, decoder = tiny_loop(), tiny_decoder(seed=9)
    objective = distil.make(load_teacher(loop, teacher), Mix(0.7, 2.0), compiled=False)
    with talks.batches(4) as stream:
        batch = next(stream)
    hidden = torch.randn(4, CONTEXT, 32, requires_grad=True)
    found = objective.loss(hidden, decoder, batch)
    (gradient,) = torch.autograd.grad(found.total, hidden)
    assert torch.equal(gradient.abs().sum(dim=2) > 0, batch.labels != IGNORE)
    assert 0 < objective.count(batch) < batch.labels.numel()
