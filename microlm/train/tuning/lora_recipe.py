"""The block `lora:` of every post-training stage, and the decoder that such a stage starts with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from microlm.core import runtime
from microlm.core.recipe import Recipe
from microlm.model import directory, lora
from microlm.model.transformer import Decoder

Names = tuple[str, ...]


class LoraRecipe(Recipe):
    """A low-rank adapter instead of all weights."""

    rank: int = Field(default=16, ge=1, description="rank of the update")
    alpha: float = Field(default=32.0, gt=0, description="the update's scale is alpha / rank")
    targets: Names | Literal["all-linear"] = Field(
        default="all-linear", min_length=1, description="matrices by name, or all linear ones of the blocks"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of an adapter's inputs that are zero")
    rslora: bool = Field(default=False, description="rank-stabilised: the scale is alpha / √rank")
    base_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="the frozen weights: auto is the products' precision; int8 has a scale for each row",
    )

    def config(self) -> lora.LoraConfig:
        """The model room's form of it."""
        base: lora.Base = "int8" if self.base_dtype == "int8" else "compute"
        return lora.LoraConfig(self.rank, self.alpha, self.targets, self.dropout, self.rslora, base)


def load(path: Path, compute_dtype: torch.dtype, adapter: LoraRecipe | None, seed: int) -> Decoder:
    """A model as tuning begins: with float32 masters, or frozen under an adapter drawn from `seed`."""
    if adapter is None:
        return directory.load(path, compute_dtype)
    decoder = directory.load(path, compute_dtype, weight_dtype=compute_dtype)
    generator = torch.Generator().manual_seed(runtime.derive_seed(seed, "lora"))
    lora.apply(decoder, adapter.config(), generator)
    return decoder
