"""Cross-entropy of the next token, in nats, whatever the rows hold; logits exist in chunks only.

Shapes: R rows, T tokens of context, D hidden, N positions with a label, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from microlm.model.transformer import Decoder
from microlm.train.batches import IGNORE, Batch
from microlm.train.objectives.objective import Objective, plain

Kernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits [N,V] and labels [N] → the sum of their losses, and its gradient [N,V] in the logits' dtype."""
ChunkKernel = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Logits of some positions, and which ones → as a kernel."""

_STEP = 256  # label counts are rounded up to this: oneDNN keeps a primitive, and its memory, for every shape
CHUNK, CUDA_CHUNK = 1024, 16384  # positions whose logits are there at once


def make(compiled: bool) -> Objective:
    """`next_token`, its kernel compiled or not."""
    return plain(partial(next_token, kernel=_compiled_kernel()) if compiled else next_token)


def next_token(hidden_RTD: Tensor, decoder: Decoder, batch: Batch, kernel: Kernel | None = None) -> Tensor:
    """The summed loss of the labels; the head runs only where there is one, some positions at a time."""
    hidden, labels = hidden_RTD.flatten(0, 1), batch.labels.flatten()
    positions = labelled_positions(batch)
    if positions is not None:
        labels = labels[positions]
    compute = kernel or _loss_and_gradient
    return chunked_head(hidden, decoder, positions, lambda logits, part: compute(logits, labels[part]))


def chunked_head(
    hidden_ND: Tensor, decoder: Decoder, positions: Tensor | None, kernel: ChunkKernel
) -> Tensor:
    """The sum of what a kernel makes of the logits of these positions (None: all), chunk by chunk."""
    weight, wanted = decoder.lm_head.weight, torch.is_grad_enabled()
    loss: Tensor = _ChunkedHead.apply(hidden_ND, weight, positions, wanted, kernel)  # type: ignore[no-untyped-call]
    return loss


def labelled_positions(batch: Batch) -> Tensor | None:
    """Places in the flat batch [R·T] that hold all labels, and some without; None when all places do."""
    labels = batch.labels.flatten()
    taken = -(-batch.label_count // _STEP) * _STEP
    if taken >= len(labels):
        return None
    return torch.argsort((labels == IGNORE).to(torch.int8), stable=True)[:taken]  # labelled ones first


class _ChunkedHead(torch.autograd.Function):
    """Head and loss in one: logits of a chunk become their gradient before the next chunk comes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        positions: Tensor | None,
        wanted: bool,
        kernel: ChunkKernel,
    ) -> Tensor:
        matrix = weight_VD.to(hidden_ND.dtype)
        rows = hidden_ND if positions is None else hidden_ND[positions]
        d_rows = torch.empty_like(rows)
        d_weight = torch.zeros_like(weight_VD) if wanted and weight_VD.requires_grad else None
        total = torch.zeros((), dtype=wide(hidden_ND.dtype), device=hidden_ND.device)
        size = chunk_size(hidden_ND.device)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            loss, gradient = kernel(rows[part] @ matrix.mT, part)
            total += loss
            if wanted:
                torch.mm(gradient, matrix, out=d_rows[part])
            if d_weight is not None:
                d_weight += gradient.mT @ rows[part]
        ctx.save_for_backward(d_rows, d_weight, positions)
        ctx.count = len(hidden_ND)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_rows, d_weight, positions = ctx.saved_tensors
        d_hidden = d_rows.mul_(scale)
        if positions is not None:
            d_hidden = d_rows.new_zeros(ctx.count, d_rows.shape[1]).index_copy_(0, positions, d_rows)
        return d_hidden, None if d_weight is None else d_weight.mul_(scale), None, None, None


def _loss_and_gradient(logits_NV: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, whatever the logits come in."""
    x = logits_NV.to(wide(logits_NV.dtype))
    sums = torch.logsumexp(x, dim=1, keepdim=True)
    known = (labels != IGNORE)[:, None]
    picked = labels.clamp(min=0)[:, None]
    loss = torch.where(known, sums - x.gather(1, picked), 0.0).sum()
    chosen = torch.arange(x.shape[1], device=x.device) == picked
    gradient = torch.where(known, torch.exp(x - sums) - chosen.to(x.dtype), 0.0)
    return loss, gradient.to(logits_NV.dtype)


@cache
def _compiled_kernel() -> Kernel:
    return torch.compile(_loss_and_gradient, dynamic=False)


def chunk_size(device: torch.device) -> int:
    """Positions whose logits may be there at once."""
    return CUDA_CHUNK if device.type == "cuda" else CHUNK


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of losses."""
    return torch.promote_types(dtype, torch.float32)
