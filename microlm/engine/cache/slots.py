"""The slotted KV cache: allocated once, its bytes known before. A row is one running request.

Shapes: N layers, S slots, K key-value heads, L positions, d head size.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from microlm.core.errors import UserError
from microlm.model.config import ModelConfig

_SHARE = 0.5  # of the free memory: what a cache may take when its length is ours to choose
_STEP = 64  # a chosen length is a multiple of this many positions


class KVCache:
    """Keys and values [N,S,K,L,d] of every slot; slots 0..n-1 are the running requests, without holes."""

    def __init__(
        self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, length, config.head_dim)
        self.length = length
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)
        self.nbytes = 2 * self.k.numel() * self.k.element_size()

    def write(self, layer: int, first: int, k: Tensor, v: Tensor) -> None:
        """Store the prompts' k, v [B,K,T,d] in slots first..first+B-1, from position 0."""
        rows, used = slice(first, first + k.shape[0]), k.shape[2]
        self.k[layer, rows, :, :used] = k
        self.v[layer, rows, :, :used] = v

    def append(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Store one token's k, v [n,K,1,d] at `places` [n·K], as `places_of` numbers them."""
        size = k.shape[-1]
        self.k[layer].view(-1, size).index_copy_(0, places, k.reshape(-1, size))
        self.v[layer].view(-1, size).index_copy_(0, places, v.reshape(-1, size))

    def places_of(self, positions: Tensor) -> Tensor:
        """Flat indices [n·K] of `positions` [n] in slots 0..n-1."""
        heads = self.k.shape[2]
        rows = torch.arange(positions.shape[0] * heads, device=positions.device).view(-1, heads)
        return (rows * self.length + positions[:, None]).flatten()

    def view(self, layer: int, rows: int, used: int) -> tuple[Tensor, Tensor]:
        """k, v [rows,K,used,d] without a copy."""
        return self.k[layer, :rows, :, :used], self.v[layer, :rows, :, :used]

    def move(self, source: int, target: int, used: int) -> None:
        """Copy a slot's first `used` positions over another slot."""
        for part in (self.k, self.v):
            part[:, target, :, :used] = part[:, source, :, :used]

    def clear(self, slot: int) -> None:
        """Forget a slot whose values are not finite: a masked NaN would still spoil its next tenant."""
        self.k[:, slot] = 0
        self.v[:, slot] = 0


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one position of one slot takes."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def choose_length(
    config: ModelConfig, slots: int, wanted: int | None, dtype: torch.dtype, device: torch.device
) -> int:
    """The positions per slot: `wanted`, or the model's window, or what half of the free memory holds."""
    window, free = config.max_position_embeddings, free_bytes(device)
    per_position = slots * bytes_per_token(config, dtype)
    if wanted is None:
        fits = int(free * _SHARE) // per_position
        return window if window <= fits else max(_STEP, fits // _STEP * _STEP)
    if not 2 <= wanted <= window:
        raise UserError(
            f"max_seq_len: {wanted} is not between 2 and the model's window of {window}; choose one that is"
        )
    if wanted * per_position > free:
        need, have = wanted * per_position / 2**30, free / 2**30
        raise UserError(
            f"max_seq_len: {slots} slots of {wanted} tokens need {need:.1f} GiB, {have:.1f} GiB are free; "
            "lower the length or the number of slots"
        )
    return wanted


def free_bytes(device: torch.device) -> int:
    """Memory that a cache may still take on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all of the memory is the best that is known
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU by calloc, so that a slot costs memory only when it is first used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
