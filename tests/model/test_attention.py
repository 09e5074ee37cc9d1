"""The forms of attention against PyTorch's own kernel, with a mask."""

from __future__ import annotations

import pytest
import torch
from training import CONTEXT, random_set

from microlm.model.attention import document_borders, spelled_attention, stripe, varlen_attention
from microlm.model.transformer import masked_attention
from microlm.train.batches import PackedRows, document_mask

LENGTH = 300  # three stripes, the last one shorter


def heads(count: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, LENGTH, 16, generator=generator).to(dtype).requires_grad_()


def segments() -> torch.Tensor:
    rows = [[0] * 100 + [1] * 190 + [2] * 10, [0] * 7 + [1] * 200 + [-1] * 93]
    return torch.tensor(rows)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "documents"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_spelled_attention_is_scaled_dot_product_attention(
    dtype: torch.dtype, tolerance: float, kv_heads: int, causal: bool
) -> None:
    """Outputs and gradients; a causal mask written out is no mask."""
    ours = [heads(4, 0, dtype), heads(kv_heads, 1, dtype), heads(kv_heads, 2, dtype)]
    theirs = [t.detach().float().requires_grad_() for t in ours]
    seen = torch.zeros(2, LENGTH, dtype=torch.int64) if causal else segments()
    y = spelled_attention(*ours, document_mask(seen[:1] if causal else seen, dtype))
    expected = masked_attention(*theirs, document_mask(seen, torch.float32))
    assert -(-LENGTH // stripe(LENGTH)) == 3
    assert y.dtype == dtype
    assert float((y.float() - expected).abs().max()) <= tolerance
    weights = heads(4, 3, torch.float32).detach()
    (y.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        assert float((a.grad.float() - b.grad).abs().max()) <= 10 * tolerance * float(b.grad.abs().max())


def test_borders_drawn_by_hand() -> None:
    """Rows of 300 end to end, padding as a document of its own; then the end, up to a power of two."""
    found = document_borders(segments())
    assert found.dtype == torch.int32
    assert found.tolist() == [0, 100, 290, 300, 307, 507, 600, 600]
    assert document_borders(torch.zeros(1, 8, dtype=torch.int64)).tolist() == [0, 8]


def test_borders_give_the_mask() -> None:
    """Two places see each other by the mask if they lie between the same borders."""
    batch = next(PackedRows({"documents": random_set("documents", 0)}, {}, CONTEXT, 0).batches(4))
    borders = document_borders(batch.segments)
    places = torch.arange(batch.segments.numel())
    document = torch.searchsorted(borders, places, right=True).view_as(batch.segments)
    mask = document_mask(batch.segments, torch.float32)[:, 0] == 0
    causal = torch.ones_like(mask).tril()
    assert torch.equal(mask, (document[:, :, None] == document[:, None, :]) & causal)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_flash_attention_over_documents_is_masked_attention(kv_heads: int) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    ours = [
        heads(n, i, dtype).detach().to(device).requires_grad_() for i, n in enumerate((4, kv_heads, kv_heads))
    ]
    theirs = [t.detach().float().requires_grad_() for t in ours]
    y = varlen_attention(*ours, document_borders(segments()).to(device))
    expected = masked_attention(*theirs, document_mask(segments().to(device), torch.float32))
    assert float((y.float() - expected).abs().max()) <= 4e-2
    y.float().sum().backward()
    expected.sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        assert float((a.grad.float() - b.grad).abs().max()) <= 0.1 * float(b.grad.abs().max())
