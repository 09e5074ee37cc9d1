"""An engine's own copy of weights that somebody else trains: made once, then brought up to date in place.

Enters: the decoder under training, adapters on it or not. Leaves: a plain one, rounded or quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microlm.engine.native.weights import QuantizedLinear
from microlm.model import lora
from microlm.model.transformer import Decoder


def bare_copy(source: Decoder, dtype: torch.dtype | None) -> Decoder:
    """A decoder of the same shape and values, adapters folded in, in `dtype` (None: as it is)."""
    stored = dtype or source.model.embed_tokens.weight.dtype
    with torch.device("meta"):  # so that nothing random is drawn
        copy = Decoder(source.config, dtype or source.compute_dtype)
    copy = copy.to_empty(device=source.cos.device).to(stored).eval().requires_grad_(False)
    if source.config.tie_word_embeddings:
        copy.lm_head.weight = copy.model.embed_tokens.weight
    copy.cos, copy.sin = source.cos.to(stored), source.sin.to(stored)
    follow(copy, source)
    return copy


@torch.no_grad()
def follow(copy: Decoder, source: Decoder) -> None:
    """Bring every weight of a copy up to date where it lies, codes of quantized matrices too."""
    known, stored = _plain_weights(source), copy.model.embed_tokens.weight.dtype
    for name, module in copy.named_modules():
        plain = name.removesuffix(".base")  # a matrix that was packed for torch
        if isinstance(module, QuantizedLinear):
            module.encode(known[f"{plain}.weight"].to(stored))
        for key, weight in module.named_parameters(recurse=False):
            weight.copy_(known[f"{plain}.{key}"])


def _plain_weights(source: Decoder) -> dict[str, Tensor]:
    """Hugging Face's names → weights, each adapter's update added to its matrix."""
    named = source.named_parameters(remove_duplicate=False)
    found: dict[str, Tensor] = {n.replace(".base.", "."): p for n, p in named if "lora_" not in n}
    for name, module in source.named_modules():
        if isinstance(module, lora.Int8Linear):
            found[f"{name.removesuffix('.base')}.weight"] = module.wide()
    for name, module in lora.adapted(source).items():
        update = module.lora_B.float() @ module.lora_A.float() * module.scale
        found[f"{name}.weight"] = found[f"{name}.weight"].float() + update
    return found
