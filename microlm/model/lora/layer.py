"""An adapter on a decoder: a small pair of trainable matrices beside each frozen one that is targeted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microlm.core.errors import UserError
from microlm.model.lora.config import LoraConfig
from microlm.model.lora.dropout import dropped_product, matrix_keys, row_keys
from microlm.model.lora.int8 import Int8Linear
from microlm.model.transformer import Decoder, Linear

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""Module name (as HF names the matrix) → A [r,in] and B [out,r]."""


class LoraLinear(nn.Module):
    """A frozen matrix and its update: `base(x) + scale · B (A x)`, in the input's precision; A, B in fp32."""

    def __init__(self, base: Linear | Int8Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        self.config = config
        self.scale = config.scale
        self.keys: Tensor | None = None  # what dropout is drawn by; there while `dropping`

    def forward(self, x: Tensor) -> Tensor:
        a = self.lora_A.to(x.dtype)
        if self.keys is None:
            low = F.linear(x, a)
        else:
            low = dropped_product(x, a, self.keys, self.config.dropout)
        return self.base(x) + F.linear(low, self.lora_B.to(x.dtype)) * self.scale


def apply(decoder: Decoder, config: LoraConfig, generator: torch.Generator | None) -> None:
    """Wrap the targeted matrices of a decoder that holds its weights, and freeze everything else.

    B is zero, so the start is exactly the base; A is kaiming-uniform, drawn on the CPU from `generator`.
    """
    require_loaded(decoder)
    require_bare(decoder)
    linears = _linears(decoder)
    config.require_fit(linears)
    decoder.requires_grad_(False)
    if config.base != "as_loaded":
        for p in decoder.parameters():
            p.data = p.data.to(decoder.compute_dtype)
    for name in list(linears):
        matrix = linears.pop(name)  # each makes room for the next
        held = Int8Linear(matrix) if config.base == "int8" else matrix
        _put(decoder, name, _wrapped(held, config, generator) if config.fits(name) else held)


def _wrapped(base: Linear | Int8Linear, config: LoraConfig, generator: torch.Generator | None) -> LoraLinear:
    wrapped = LoraLinear(base, config)
    bound = math.sqrt(1.0 / base.in_features)  # kaiming-uniform with a = √5, as PEFT starts
    with torch.no_grad():
        wrapped.lora_A.copy_(torch.empty(wrapped.lora_A.shape).uniform_(-bound, bound, generator=generator))
    return wrapped


def _linears(decoder: Decoder) -> dict[str, Linear]:
    """Every matrix inside the blocks by HF's name, in a fixed order."""
    return {n: m for n, m in matrices(decoder).items() if isinstance(m, Linear)}


def matrices(decoder: Decoder) -> dict[str, Any]:
    """Every linear layer inside the blocks by HF's name, a quantized one too."""
    return {
        f"model.layers.{name}": m
        for name, m in decoder.model.layers.named_modules()
        if hasattr(m, "in_features")
    }


def _put(decoder: Decoder, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(decoder.get_submodule(parent), attribute, module)


def adapted(decoder: Decoder) -> dict[str, LoraLinear]:
    """Module name (as HF names the matrix) → adapter, in the order of the layers."""
    return {name: m for name, m in decoder.named_modules() if isinstance(m, LoraLinear)}


def adapter_parameters(decoder: Decoder) -> list[nn.Parameter]:
    """The trainable matrices, A before B, in the order of the layers."""
    return [p for m in adapted(decoder).values() for p in (m.lora_A, m.lora_B)]


def pairs_of(decoder: Decoder) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter on a decoder, as `unmerge` takes it."""
    return {name: (m.lora_A.detach(), m.lora_B.detach()) for name, m in adapted(decoder).items()}


def merge(decoder: Decoder) -> None:
    """Fold every adapter into its matrix, in float32; the parameter names are HF's again."""
    modules = adapted(decoder)
    if any(isinstance(m.base, Int8Linear) for m in modules.values()):
        raise UserError(
            "lora: the base is held as int8, and an adapter is merged into the original weights; "
            "load the model anew, then the adapter, and merge those"
        )
    for name, module in modules.items():
        _add(module.base, module.lora_A, module.lora_B, module.scale)
        _put(decoder, name, module.base)
    decoder.requires_grad_(True)


def unmerge(decoder: Decoder, config: LoraConfig, pairs: Pairs) -> None:
    """Take a merged adapter out of the matrices again: what is left is the base, up to float32's rounding."""
    require_bare(decoder)
    linears = _linears(decoder)
    for name, (a, b) in pairs.items():
        _add(linears[name], a, b, -config.scale)


def _add(matrix: Any, a: Tensor, b: Tensor, scale: float) -> None:
    weight = matrix.weight
    with torch.no_grad():
        update = b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)
        weight.copy_(weight.float() + update * scale)


def draw_seed(decoder: Decoder) -> int:
    """A step's seed of dropout, from torch's own generator (whose state a checkpoint keeps); 0 without."""
    if not any(m.config.dropout for m in adapted(decoder).values()):
        return 0
    return int(torch.randint(1 << 31, ()))


@contextmanager
def dropping(decoder: Decoder, seed: int, first: int, shape: torch.Size) -> Iterator[None]:
    """Within it, forward passes over the rows `first` … of a batch drop inputs; elsewhere nothing is dropped.

    `shape` is [R,T], that of the rows.
    """
    modules = [m for m in adapted(decoder).values() if m.config.dropout]
    if modules:
        keys = row_keys(seed, first, shape[0], shape[1], decoder.cos.device)
        for number, module in enumerate(modules):
            module.keys = matrix_keys(keys, number)
    try:
        yield
    finally:
        for module in modules:
            module.keys = None


def require_loaded(decoder: Decoder) -> None:
    """Refuse a decoder that still holds what its constructor left."""
    if decoder.weights_from is None:
        raise UserError(
            "lora: the weights of this decoder were not loaded yet, and an adapter belongs to those; load "
            "them first (microlm.model.directory.load)"
        )


def require_bare(decoder: Decoder) -> None:
    """Refuse a decoder that carries an adapter."""
    if adapted(decoder):
        raise UserError("lora: the model carries an adapter already; merge it first")
