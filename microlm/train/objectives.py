"""What is learnt: `(hidden states, decoder, batch) → summed loss`, a value passed to the one loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from microlm.model.transformer import Decoder
from microlm.train.batches import IGNORE, Batch

Objective = Callable[[Tensor, Decoder, Batch], Tensor]
"""Hidden states [R,T,D] of a batch → the sum of the losses of its labels, in nats, float32."""

_STEP = 256  # label counts are rounded up to this: oneDNN keeps a primitive, and its memory, for every shape


def next_token(hidden_RTD: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
    """Cross-entropy of the labels; the head runs only where there is one."""
    labels = batch.labels.flatten()
    order = torch.argsort((labels == IGNORE).to(torch.int8), stable=True)  # labelled positions first
    count = int((labels != IGNORE).sum())
    positions = order[: -(-count // _STEP) * _STEP]
    logits = decoder.logits(hidden_RTD.flatten(0, 1)[positions])
    return F.cross_entropy(logits, labels[positions], reduction="sum", ignore_index=IGNORE)
