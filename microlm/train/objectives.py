"""What is learnt: `(hidden states, decoder, batch) → summed loss`, a value passed to the one loop."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from microlm.model.transformer import Decoder
from microlm.train.batches import IGNORE, Batch

Objective = Callable[[Tensor, Decoder, Batch], Tensor]
"""Hidden states [R,T,D] of a batch → the sum of the losses of its labels, in nats, float32."""


def next_token(hidden_RTD: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
    """Cross-entropy of the labels; the head runs only where there is one."""
    labels = batch.labels.flatten()
    positions = (labels != IGNORE).nonzero().squeeze(1)
    logits = decoder.logits(hidden_RTD.flatten(0, 1)[positions])
    return F.cross_entropy(logits, labels[positions], reduction="sum")
