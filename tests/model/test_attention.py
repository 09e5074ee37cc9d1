"""Attention written out for the compiler against PyTorch's own kernel."""

from __future__ import annotations

import pytest
import torch

from microlm.model.transformer import masked_attention, spelled_attention
from microlm.train.batches import document_mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_spelled_attention_is_scaled_dot_product_attention(
    dtype: torch.dtype, tolerance: float, kv_heads: int
) -> None:
    generator = torch.Generator().manual_seed(0)

    def heads(count: int) -> torch.Tensor:
        return torch.randn(2, count, 24, 16, generator=generator).to(dtype)

    q, k, v = heads(4), heads(kv_heads), heads(kv_heads)
    segments = torch.tensor([[0] * 10 + [1] * 14, [0] * 20 + [-1] * 4])
    mask = document_mask(segments, dtype)
    expected = masked_attention(q.float(), k.float(), v.float(), mask.float())
    assert float((spelled_attention(q, k, v, mask).float() - expected).abs().max()) <= tolerance
