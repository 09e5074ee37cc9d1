"""Matrices as int8 or int4 codes. Enters: a decoder; leaves: the same, in a quarter of the bytes or less.

Shapes: O outputs, I inputs, S groups of 64 inputs.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microlm.core.errors import UserError
from microlm.model.transformer import Decoder, Linear

Quantization = Literal["int8", "int4"]
GROUP = 64
"""Inputs of an int4 matrix that share a scale and a zero."""
_LARGEST_INT8, _LARGEST_INT4 = 127, 15
_ROWS = 4096  # quantised at once, so that the head's floats are never copied whole


class QuantizedLinear(nn.Module):
    """A matrix as `codes` and float32 `scales`: int8 [O,I] and [O]; int4 [O,S,32], two a byte, and [O,S,2].

    int8: weight = scale · code. int4: weight = scale · code + zero; the low half of a byte is of the group's
    first half. The last group is filled up with zeros.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: Linear, kind: Quantization) -> None:
        super().__init__()
        self.out_features, self.in_features, self.kind = linear.out_features, linear.in_features, kind
        codes, scales = self._encoded(linear.weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def encode(self, weight: Tensor) -> None:
        """Take over other floats [O,I] in place."""
        for kept, new in zip((self.codes, self.scales), self._encoded(weight), strict=True):
            kept.copy_(new)

    @torch.no_grad()
    def _encoded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        encode = _encode_int8 if self.kind == "int8" else _encode_int4
        parts = [encode(rows.float()) for rows in weight.split(_ROWS)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])

    @property
    def weight(self) -> Tensor:
        """The matrix as floats [O,I]."""
        if self.kind == "int8":
            return self.codes.float() * self.scales[:, None]
        both = torch.cat((self.codes & 15, self.codes >> 4), dim=-1)
        scale, zero = self.scales.unbind(-1)
        return (both * scale[..., None] + zero[..., None]).flatten(1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kind == "int4":
            return F.linear(x, self.weight.to(x.dtype), bias)
        y = F.linear(x, self.codes.to(x.dtype)) * self.scales.to(x.dtype)  # codes are exact in bf16 too
        return y if bias is None else y + bias


def quantize(decoder: Decoder, kind: Quantization) -> None:
    """Replace every matrix of the blocks, and the head, by its codes; embeddings and norms stay."""
    if kind not in get_args(Quantization):
        raise UserError(f"quantize: {kind!r} is not one of {', '.join(get_args(Quantization))}")
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, QuantizedLinear(child, kind))


def weight_bytes(decoder: Decoder) -> int:
    """Memory of all weights, codes, scales and norms; a shared table once."""
    kept = {t.data_ptr(): t.numel() * t.element_size() for t in (*decoder.parameters(), *decoder.buffers())}
    tables = (decoder.cos.data_ptr(), decoder.sin.data_ptr())
    return sum(size for place, size in kept.items() if place not in tables)


def _encode_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [O,I] and float32 scales [O]."""
    scales = rows.abs().amax(-1) / _LARGEST_INT8
    codes = torch.round(rows / torch.where(scales == 0, 1.0, scales)[:, None])
    return codes.clamp_(-_LARGEST_INT8, _LARGEST_INT8).to(torch.int8), scales


def _encode_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int4 codes, two a byte [O,S,32], and scale and zero [O,S,2], from least to largest of each group."""
    groups = F.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    zero = groups.amin(-1)
    scale = (groups.amax(-1) - zero) / _LARGEST_INT4
    divisor = torch.where(scale == 0, 1.0, scale)[..., None]
    codes = torch.round((groups - zero[..., None]) / divisor)
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4), torch.stack((scale, zero), dim=-1)
