"""Attention over whole rows, as training has it: written out for the compiler, and FlashAttention over documents.

Shapes: B rows, T tokens, H heads, K key-value heads, G heads of each of them, S queries of a stripe, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRIPES, NARROWEST = 4, 128  # at most so many stripes, none of fewer queries


def spelled_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q [B,H,T,d] to k and v [B,K,T,d], for torch.compile; no mask [B,1,T,T] means causal.

    Queries go in stripes, each over the keys up to its end: nothing later is ever seen, with a mask either.
    On CPUs it beats the built-in kernel.
    """
    length, size = q.shape[2], stripe(q.shape[2])
    q_BKGTd = (q * q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1))
    stripes = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        queries = q_BKGTd[:, :, :, start:stop].flatten(2, 3)
        scores = (queries @ k[:, :, :stop].mT).unflatten(2, (-1, stop - start))  # [B,K,G,S,stop]
        if mask is None:
            here = torch.arange(start, stop, device=q.device)
            later = torch.arange(stop, device=q.device) > here[:, None]
            scores = scores.masked_fill(later, float("-inf"))
        else:
            scores = scores + mask[:, :, None, start:stop, :stop]
        shares = torch.softmax(scores, dim=-1)  # summed in float32, kept in q's dtype
        stripes.append((shares.flatten(2, 3) @ v[:, :, :stop]).unflatten(2, (-1, stop - start)))
    return torch.cat(stripes, dim=3).flatten(1, 2)


def stripe(length: int) -> int:
    """How many queries of a row of `length` tokens go at once."""
    return max(NARROWEST, -(-length // STRIPES))


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
    """FlashAttention, causal within each document; `borders` (int32, on the GPU) as `document_borders` has them.

    The rows lie end to end: their documents are those between two borders. CUDA, bf16.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, length = q.shape[0], q.shape[2]
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # [B·T, heads, d]
    grouped = q.shape[1] != k.shape[1]
    y = varlen_attn(*flat, borders, borders, length, length, window_size=(-1, 0), enable_gqa=grouped)
    assert isinstance(y, Tensor)
    return y.unflatten(0, (rows, length)).transpose(1, 2)


def document_borders(segments: Tensor) -> Tensor:
    """Where documents of rows laid end to end begin, and the end: int32, from segments [B,T].

    The end is repeated until the number is a power of two, so that few shapes are compiled: documents of no
    length change nothing.
    """
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    found = begins.flatten().nonzero().flatten()
    borders = torch.full((1 << len(found).bit_length(),), segments.numel(), dtype=torch.int32)
    borders[: len(found)] = found
    return borders
