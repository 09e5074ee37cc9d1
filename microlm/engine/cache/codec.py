"""Keys and values ↔ int8 or int4 codes, a scale for every token and head: the reference of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_INT8, LARGEST_INT4 = 127, 15


def encode(values: Tensor, shifted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Heads [...,d] → codes, bf16 scales [...] and, for int4 (`shifted`), bf16 zeros [...].

    Codes are value / scale, or (value - zero) / scale, in float32, rounded half to even, by the stored scale.
    """
    x = values.float()
    if not shifted:
        scale = (x.abs().amax(-1) / LARGEST_INT8).to(torch.bfloat16)
        codes = _codes(x, scale).clamp_(-LARGEST_INT8, LARGEST_INT8)
        return codes.to(torch.int8), scale, None
    zero = x.amin(-1).to(torch.bfloat16)
    scale = ((x.amax(-1) - zero.float()) / LARGEST_INT4).clamp(min=0.0).to(torch.bfloat16)
    codes = _codes(x - zero.float()[..., None], scale).clamp_(0, LARGEST_INT4).to(torch.uint8)
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4), scale, zero


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `encode` stored, as heads [...,d] of `dtype`; computed in float32."""
    if zero is None:
        return (codes.float() * scale.float()[..., None]).to(dtype)
    both = torch.cat((codes & 15, codes >> 4), dim=-1)
    return (both.float() * scale.float()[..., None] + zero.float()[..., None]).to(dtype)


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    """Values that are not finite get code 0: their scale is not finite either, and tells of it."""
    divisor = torch.where(scale == 0, 1.0, scale.float())[..., None]
    return torch.round(x / divisor).nan_to_num_(0.0, 0.0, 0.0)
