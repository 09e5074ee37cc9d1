"""The objective is cross-entropy over the full logits, however few positions carry a label."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from training import CONTEXT, VOCAB, tiny_decoder

from microlm.train import objectives
from microlm.train.batches import IGNORE, Batch
from microlm.train.objectives.logprobs import label_logprobs

COMPILED = pytest.param(True, marks=pytest.mark.slow)


def drawn(share: float, dtype: torch.dtype) -> tuple[torch.Tensor, Batch]:
    """Hidden states and a batch of which a share of the positions have labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (20, CONTEXT), generator=generator)
    labels = torch.randint(VOCAB, (20, CONTEXT), generator=generator)
    labels[torch.rand(20, CONTEXT, generator=generator) >= share] = IGNORE
    hidden = torch.randn(20, CONTEXT, 32, generator=generator).to(dtype).requires_grad_()
    return hidden, Batch(ids, labels, torch.zeros_like(ids))


@pytest.mark.parametrize("compiled", [False, COMPILED])
@pytest.mark.parametrize("chunk", [100, 1024])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_next_token_is_cross_entropy(
    share: float, chunk: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients, in chunks that do not divide the positions, and all at once."""
    monkeypatch.setattr("microlm.train.objectives.cross_entropy.CHUNK", chunk)
    decoder = tiny_decoder()
    hidden, batch = drawn(share, torch.float32)
    loss = objectives.make(compiled).loss(hidden, decoder, batch).total
    logits = decoder.logits(hidden).flatten(0, 1)
    expected = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert loss.dtype == torch.float32
    assert batch.label_count == int((batch.labels != IGNORE).sum())
    leaves = (hidden, decoder.lm_head.weight)
    got = torch.autograd.grad(loss / 7, leaves, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(got, torch.autograd.grad(expected / 7, leaves), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("chunk", [100, 1024])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_label_logprobs_are_those_of_the_logits(
    share: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients under any weights of the positions; their sum is minus the loss."""
    monkeypatch.setattr("microlm.train.objectives.cross_entropy.CHUNK", chunk)
    decoder = tiny_decoder()
    hidden, batch = drawn(share, torch.float32)
    found = label_logprobs(hidden, decoder, batch)
    scores = torch.log_softmax(decoder.logits(hidden), dim=-1)
    known = batch.labels != IGNORE
    expected = scores.gather(2, batch.labels.clamp(min=0)[..., None])[..., 0] * known
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)
    assert not found[~known].any()
    assert torch.allclose(-found.sum(), objectives.next_token(hidden, decoder, batch), rtol=1e-5)
    weights = torch.randn(batch.labels.shape, generator=torch.Generator().manual_seed(5))
    leaves = (hidden, decoder.lm_head.weight)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), leaves) for x in (found, expected))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_bfloat16_loses_no_more_than_its_logits() -> None:
    """The loss is that of the rounded logits in float32; gradients are within bf16's 8 bits."""
    decoder = tiny_decoder()
    decoder.lm_head.weight.data.mul_(50)
    hidden, batch = drawn(1.0, torch.bfloat16)
    loss = objectives.next_token(hidden, decoder, batch)
    logits = (hidden.detach() @ decoder.lm_head.weight.detach().bfloat16().mT).float().requires_grad_()
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    weight = torch.autograd.grad(loss, decoder.lm_head.weight)[0]
    (exact,) = torch.autograd.grad(expected, logits)
    theirs = exact.flatten(0, 1).mT @ hidden.detach().float().flatten(0, 1)
    assert weight.dtype == torch.float32
    assert float((weight - theirs).norm() / theirs.norm()) < 1e-2


def test_a_frozen_head_passes_the_gradient_on() -> None:
    decoder = tiny_decoder()
    decoder.lm_head.weight.requires_grad_(False)
    hidden, batch = drawn(0.5, torch.float32)
    objectives.next_token(hidden, decoder, batch).backward()
    assert hidden.grad is not None and float(hidden.grad.abs().max()) > 0
    assert decoder.lm_head.weight.grad is None


def test_tied_tables_get_both_gradients() -> None:
    decoder = tiny_decoder(tie_word_embeddings=True)
    _, batch = drawn(1.0, torch.float32)
    hidden = decoder.model.embed_tokens(batch.input_ids)
    loss = objectives.next_token(hidden, decoder, batch)
    logits = decoder.logits(hidden).flatten(0, 1)
    expected = F.cross_entropy(logits, batch.labels.flatten(), reduction="sum")
    weight = decoder.model.embed_tokens.weight
    ours, theirs = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (loss, expected))
    assert torch.allclose(ours, theirs, atol=1e-4)


@torch.no_grad()
def test_without_gradients_nothing_is_kept() -> None:
    decoder = tiny_decoder()
    hidden, batch = drawn(1.0, torch.float32)
    loss = objectives.next_token(hidden, decoder, batch)
    logits = decoder.logits(hidden).flatten(0, 1)
    assert not loss.requires_grad
    assert torch.allclose(loss, F.cross_entropy(logits, batch.labels.flatten(), reduction="sum"))
