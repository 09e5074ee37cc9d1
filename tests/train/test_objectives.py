"""The objective is cross-entropy over the full logits, however few positions carry a label."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from training import CONTEXT, VOCAB, tiny_decoder

from microlm.train import objectives
from microlm.train.batches import IGNORE, Batch


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_next_token_is_cross_entropy(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    decoder = tiny_decoder()
    ids = torch.randint(VOCAB, (20, CONTEXT), generator=generator)
    labels = torch.randint(VOCAB, (20, CONTEXT), generator=generator)
    labels[torch.rand(20, CONTEXT, generator=generator) >= share] = IGNORE
    hidden = torch.randn(20, CONTEXT, 32, generator=generator, requires_grad=True)
    batch = Batch(ids, labels, torch.zeros_like(ids))
    loss = objectives.next_token(hidden, decoder, batch)
    logits = decoder.logits(hidden).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert loss.dtype == torch.float32
    assert batch.label_count == int((labels != IGNORE).sum())
    leaves = (hidden, decoder.lm_head.weight)
    got = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(got, torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
