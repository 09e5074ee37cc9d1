"""Attention over whole rows, as training has it: written out for the compiler, FlashAttention over documents.

Shapes: B rows, T tokens, H heads, K key-value heads, N = B·K, G = H / K, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRIPES, NARROWEST = 4, 128  # at most so many stripes, none of fewer queries


def spelled_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of q [B,H,T,d] to k and v [B,K,T,d] under a mask [B or 1,1,T,T], for torch.compile.

    Queries go in stripes, each over the keys up to its end: nothing later is ever seen. Shares are divided by
    their sum after the product with v, as in FlashAttention (2205.14135): there are fewer elements, and the
    backward pass needs no sum over keys. On CPUs it beats the built-in kernel.
    """
    B, H, T, d = q.shape
    K, size = k.shape[1], stripe(T)
    q_NGTd, k_NTd, v_NTd = q.reshape(B * K, H // K, T, d), k.reshape(B * K, T, d), v.reshape(B * K, T, d)
    stripes = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        scores = torch.bmm(q_NGTd[:, :, start:stop].flatten(1, 2), k_NTd[:, :stop].mT)
        scores = scores.view(B, H, stop - start, stop).float() * d**-0.5 + mask[:, :, start:stop, :stop]
        shares = torch.exp(scores - scores.detach().amax(dim=-1, keepdim=True)).to(q.dtype)
        sums = shares.sum(dim=-1, keepdim=True, dtype=torch.float32)
        y = torch.bmm(shares.view(B * K, -1, stop), v_NTd[:, :stop]).view(B, H, stop - start, d)
        stripes.append((y / sums).to(q.dtype))
    return torch.cat(stripes, dim=2)


def stripe(length: int) -> int:
    """How many queries of a row of `length` tokens go at once."""
    return max(NARROWEST, -(-length // STRIPES))


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
    """FlashAttention, causal within each document, on CUDA in bf16.

    Rows lie end to end, documents between the `borders` that `document_borders` finds (int32, on the GPU).
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, length = q.shape[0], q.shape[2]
    q_MHd, k_MKd, v_MKd = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # M = B·T
    grouped = q.shape[1] != k.shape[1]
    y = varlen_attn(
        q_MHd, k_MKd, v_MKd, borders, borders, length, length, window_size=(-1, 0), enable_gqa=grouped
    )
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
