"""Matrices in the order in which oneDNN reads them, which torch otherwise restores in every product.

Enters: a bf16 decoder on a CPU; leaves: the same one, whose products of 16 to 64 rows take two thirds of the
time. The copies take as much memory as the weights, so large models go without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from microlm.model.transformer import Decoder, Linear

MOST_BYTES = 2**30  # of weights
_ROWS = 32  # of the products that the order is chosen for


class PackedLinear(nn.Module):
    """A matrix and its copy for products; biases stay as they are."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.refresh()

    def refresh(self) -> None:
        """Copy the matrix again."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.base.weight.detach(), _ROWS)

    @property
    def weight(self) -> Tensor:
        """The matrix itself."""
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        """What is added behind it, if anything is."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.base.bias, "none", [], "")


def can_pack(decoder: Decoder) -> bool:
    """Whether the decoder and the processor are of the kind that gains."""
    weights = list(decoder.parameters())
    if decoder.cos.device.type != "cpu" or any(w.dtype != torch.bfloat16 for w in weights):
        return False
    fits = sum(w.numel() for w in weights) * 2 <= MOST_BYTES
    return fits and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(decoder: Decoder) -> None:
    """Replace every matrix by a packed one."""
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, PackedLinear(child))


def refresh(decoder: Decoder) -> None:
    """Copy every packed matrix again."""
    for module in decoder.modules():
        if isinstance(module, PackedLinear):
            module.refresh()
