"""The tensors of the paged KV cache: allocated once, their bytes known before.

Shapes: N layers, P pages, K key-value heads, d head size, w stored head size, n rows, m pages of a row.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from microlm.engine.cache import codec
from microlm.model.config import ModelConfig

PAGE = 32
"""Tokens of a page."""
KVDtype = Literal["auto", "int8", "int4"]
"""auto: as the activations, float32 or bfloat16."""


class KVStore:
    """Keys and values `k`, `v` [N,P,K,PAGE,w] of every page. Page 0 belongs to nobody: padding goes there.

    int8: value = scale · code. int4: value = scale · code + zero; w is d / 2 bytes, the low half of a byte is
    of the head's first half. Scales and zeros [N,P,K,PAGE] are bf16 as uint16; int8 has no zeros.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        dtype: KVDtype = "auto",
        precision: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        at = device or torch.device("cpu")
        self.dtype, self.pages, self.precision = dtype, pages, precision
        self.heads, self.head_dim = config.num_key_value_heads, config.head_dim
        rows = (config.num_hidden_layers, pages, self.heads, PAGE)
        width = self.head_dim // 2 if dtype == "int4" else self.head_dim
        stored = {"auto": precision, "int8": torch.int8, "int4": torch.uint8}[dtype]
        self.k, self.v = (_zeros((*rows, width), stored, at) for _ in "kv")
        scaled, shifted = dtype != "auto", dtype == "int4"
        self.k_scale, self.v_scale = (_zeros(rows, torch.uint16, at) if scaled else None for _ in "kv")
        self.k_zero, self.v_zero = (_zeros(rows, torch.uint16, at) if shifted else None for _ in "kv")
        self.nbytes = sum(t.numel() * t.element_size() for t in self._tensors())

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [T,K,d] at `places` [T·K], each (page · K + head) · PAGE + offset."""
        for values, part, scale, zero in (
            (k, self.k, self.k_scale, self.k_zero),
            (v, self.v, self.v_scale, self.v_zero),
        ):
            flat = values.reshape(-1, self.head_dim)
            if scale is not None:
                flat, scales, zeros = codec.encode(flat, shifted=zero is not None)
                _bits(scale[layer]).index_copy_(0, places, scales.view(torch.int16))
                if zero is not None and zeros is not None:
                    _bits(zero[layer]).index_copy_(0, places, zeros.view(torch.int16))
            part[layer].view(-1, part.shape[-1]).index_copy_(0, places, flat)

    def gather(self, layer: int, heads: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """k, v [rows,K,m·PAGE,d] of the pages in `heads` [rows·K·m], each page · K + head."""
        k = self._read(self.k[layer], self.k_scale, self.k_zero, layer, heads)
        v = self._read(self.v[layer], self.v_scale, self.v_zero, layer, heads)
        shape = (rows, self.heads, -1, self.head_dim)
        return k.view(shape), v.view(shape)

    def clear(self, pages: list[int]) -> None:
        """Zero pages that get a new tenant: what is masked must be a number, for NaN · 0 is NaN."""
        chosen = pages[0] if len(pages) == 1 else torch.tensor(pages, device=self.k.device)
        for part in self._tensors():
            (part.view(torch.int16) if part.dtype == torch.uint16 else part)[:, chosen] = 0

    def _read(
        self, part: Tensor, scale: Tensor | None, zero: Tensor | None, layer: int, heads: Tensor
    ) -> Tensor:
        codes = part.view(-1, PAGE, part.shape[-1]).index_select(0, heads)
        if scale is None:
            return codes
        scales = _pages(scale[layer]).index_select(0, heads)
        zeros = None if zero is None else _pages(zero[layer]).index_select(0, heads)
        return codec.decode(codes, scales, zeros, self.precision)

    def _tensors(self) -> list[Tensor]:
        parts = (self.k, self.v, self.k_scale, self.v_scale, self.k_zero, self.v_zero)
        return [t for t in parts if t is not None]


def page_bytes(config: ModelConfig, dtype: KVDtype, precision: torch.dtype) -> int:
    """Bytes of one page, all layers."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads * PAGE
    if dtype == "auto":
        return heads * config.head_dim * precision.itemsize
    return heads * (config.head_dim + 2 if dtype == "int8" else config.head_dim // 2 + 4)


def _bits(part: Tensor) -> Tensor:
    """One layer's scales [P·K·PAGE] as int16, which torch copies by index; uint16 it does not."""
    return part.view(torch.int16).view(-1)


def _pages(part: Tensor) -> Tensor:
    """One layer's scales [P·K,PAGE] as the numbers they are."""
    return part.view(torch.bfloat16).view(-1, PAGE)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU by calloc, so that a page costs memory only when it is first used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
