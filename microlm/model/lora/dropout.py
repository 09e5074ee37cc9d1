"""Dropout before an adapter's A, drawn by a hash of (seed of the step, row, position, matrix, element).

So it is the same whatever the micro-batches, ranks, compiler or recomputation, and no mask is kept.
Shapes: R rows, T positions, D inputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_BITS = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1


def row_keys(seed: int, first: int, rows: int, length: int, device: torch.device) -> Tensor:
    """A number below 2³² for each position [R,T] of the rows `first` … of a batch."""
    row = torch.arange(first, first + rows, device=device)[:, None]
    return _mixed(_mixed(_mixed(row + 1) ^ (seed & _BITS)) + torch.arange(length, device=device) * _GOLDEN)


def matrix_keys(keys_RT: Tensor, number: int) -> Tensor:
    """The numbers of one matrix, of those of a batch."""
    return _mixed(keys_RT ^ (number * _GOLDEN & _BITS))


def dropped(x: Tensor, keys: Tensor, rate: float) -> Tensor:
    """`x` [R,T,D] with a share of `rate` of its elements zero, the others divided by what is kept."""
    places = torch.arange(x.shape[-1], device=x.device) * _GOLDEN
    kept = _mixed(keys[..., None] + places) >= round(rate * (_BITS + 1))
    return torch.where(kept, x * (1 / (1 - rate)), 0)


def dropped_product(x: Tensor, a: Tensor, keys: Tensor, rate: float) -> Tensor:
    """`dropped(x) aᵀ` [R,T,r]; only `x` itself is kept for the backward pass."""
    y: Tensor = _DroppedProduct.apply(x, a, keys, rate)  # type: ignore[no-untyped-call]
    return y


class _DroppedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, keys: Tensor, rate: float) -> Tensor:
        ctx.save_for_backward(x, a, keys)
        ctx.rate = rate
        return F.linear(dropped(x, keys, rate), a)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # type: ignore[override]
        x, a, keys = ctx.saved_tensors
        da = dy.flatten(0, -2).mT @ dropped(x, keys, ctx.rate).flatten(0, -2)
        dx = dropped(dy @ a, keys, ctx.rate) if ctx.needs_input_grad[0] else None
        return dx, da, None, None


def _mixed(value: Tensor) -> Tensor:
    """32 bits, each of which depends on all of the low 32 of `value` (a finaliser of two multiplications).

    In int64, where nothing overflows: what a compiler makes of an overflow is its own.
    """
    value = value & _BITS
    value = ((value >> 16) ^ value) * 0x45D9F3B & _BITS
    value = ((value >> 16) ^ value) * 0x45D9F3B & _BITS
    return (value >> 16) ^ value
