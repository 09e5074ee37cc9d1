"""How much the KV cache may take, decided before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from microlm.core.errors import UserError
from microlm.engine.cache.pages import pages_for
from microlm.engine.cache.store import PAGE, KVDtype, page_bytes
from microlm.model.config import ModelConfig

_SHARE = 0.5  # of the free memory: what a cache may take when its size is ours to choose


class Size(NamedTuple):
    """Pages in all, page 0 among them, and the longest sequence in tokens."""

    pages: int
    length: int


def choose_size(
    config: ModelConfig,
    dtype: KVDtype,
    precision: torch.dtype,
    free: int,
    max_seqs: int,
    max_seq_len: int | None,
    kv_memory: int | None,
) -> Size:
    """Pages for `max_seqs` sequences of full length, or what `kv_memory` bytes hold, or half of `free` bytes.

    Without `max_seq_len` the length is the model's window, or less when the pages hold less.
    """
    window, page = config.max_position_embeddings, page_bytes(config, dtype, precision)
    if max_seq_len is not None and not 2 <= max_seq_len <= window:
        raise UserError(
            f"max_seq_len: {max_seq_len} is not between 2 and the model's window of {window}; "
            "choose one that is"
        )
    if kv_memory is not None and kv_memory > free:
        raise UserError(
            f"kv_memory: {kv_memory / 2**30:.1f} GiB were asked for, {free / 2**30:.1f} GiB are free; "
            "ask for less"
        )
    longest = pages_for(max_seq_len or window)
    held = free * _SHARE if kv_memory is None else kv_memory
    pages = min(int(held) // page, max_seqs * longest + 1)
    least = longest if max_seq_len is not None else 1
    if pages < least + 1:
        need, word = (least + 1) * page / 2**30, "kv_memory" if kv_memory is not None else "max_seq_len"
        raise UserError(
            f"{word}: one sequence of {min(least * PAGE, max_seq_len or window)} tokens needs {need:.3g} GiB "
            f"of KV cache, {held / 2**30:.3g} GiB may be taken; lower max_seq_len or raise kv_memory"
        )
    return Size(pages, min(max_seq_len or window, (pages - 1) * PAGE))


def free_bytes(device: torch.device) -> int:
    """Memory that a cache may still take on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all of the memory is the best that is known
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
