"""Log-probabilities of the labels, with gradient; logits exist in chunks only and are computed twice.

Shapes: R rows, T tokens of context, D hidden, N positions of the flat batch, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microlm.model.transformer import Decoder
from microlm.train.batches import IGNORE, Batch
from microlm.train.objectives.cross_entropy import chunk_size, labelled_positions, wide


def label_logprobs(hidden_RTD: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
    """log p(label) [R,T] in nats, float32 (float64 of such a model); 0 where there is no label."""
    hidden, labels = hidden_RTD.flatten(0, 1), batch.labels.flatten()
    places = labelled_positions(batch)
    if places is None:
        found: Tensor = _LabelLogprobs.apply(hidden, decoder.lm_head.weight, labels)  # type: ignore[no-untyped-call]
    else:
        some: Tensor = _LabelLogprobs.apply(hidden[places], decoder.lm_head.weight, labels[places])  # type: ignore[no-untyped-call]
        found = some.new_zeros(len(labels)).index_copy(0, places, some)
    return found.view_as(batch.labels)


class _LabelLogprobs(torch.autograd.Function):
    """The head and log-softmax at the labels; the backward pass asks for the logits of a chunk again."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_VD: Tensor, labels: Tensor) -> Tensor:
        matrix = weight_VD.to(rows_ND.dtype)
        found = torch.empty(len(rows_ND), dtype=wide(rows_ND.dtype), device=rows_ND.device)
        sums = torch.empty_like(found)
        size = chunk_size(rows_ND.device)
        for start in range(0, len(rows_ND), size):
            part = slice(start, start + size)
            x = (rows_ND[part] @ matrix.mT).to(found.dtype)
            sums[part] = torch.logsumexp(x, dim=1)
            picked = x.gather(1, labels[part].clamp(min=0)[:, None])[:, 0]
            found[part] = torch.where(labels[part] != IGNORE, picked - sums[part], 0.0)
        ctx.save_for_backward(rows_ND, weight_VD, labels, sums)
        return found

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, labels, sums = ctx.saved_tensors
        matrix = weight.to(rows.dtype)
        d_rows = torch.empty_like(rows)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        factors = torch.where(labels != IGNORE, scale, 0.0)
        size = chunk_size(rows.device)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            x = (rows[part] @ matrix.mT).to(sums.dtype)
            gradient = torch.exp(x - sums[part, None]).mul_(-factors[part, None])
            gradient.scatter_add_(1, labels[part].clamp(min=0)[:, None], factors[part, None])
            low = gradient.to(rows.dtype)
            torch.mm(low, matrix, out=d_rows[part])
            if d_weight is not None:
                d_weight += low.mT @ rows[part]
        return d_rows, d_weight, None
