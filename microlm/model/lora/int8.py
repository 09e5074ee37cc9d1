"""A frozen matrix as int8 with a float32 scale for each output row; widened on the fly, never kept wide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microlm.model.transformer import Linear


class Int8Linear(nn.Module):
    """What a `Linear` computes, its weights rounded to 255 steps of the largest of their row."""

    scale: Tensor

    def __init__(self, matrix: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        wide = matrix.weight.detach().float()
        largest = wide.abs().amax(dim=1)
        scale = torch.where(largest > 0, largest, 1.0) / 127
        codes = (wide / scale[:, None]).round_().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if matrix.bias is None else nn.Parameter(matrix.bias.detach(), requires_grad=False)

    def wide(self) -> Tensor:
        """The rounded matrix in float32."""
        return self.weight.float() * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(x.dtype)


class _Product(torch.autograd.Function):
    """`x Wᵀ` with W = scale · codes. What is kept for the backward pass is there anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return (F.linear(x, codes.to(x.dtype)) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        codes, scale = ctx.saved_tensors
        return (dy * scale).to(dy.dtype) @ codes.to(dy.dtype), None, None
