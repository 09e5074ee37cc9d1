"""The block `lora:` of every post-training stage."""

from __future__ import annotations

from pydantic import Field

from microlm.core.recipe import Recipe
from microlm.model import lora


class LoraRecipe(Recipe):
    """A low-rank adapter instead of all weights."""

    rank: int = Field(default=16, ge=1, description="rank of the update")
    alpha: float = Field(default=32.0, gt=0, description="the update's scale is alpha / rank")
    targets: tuple[str, ...] = Field(default=(), description="matrices by name; empty for all linear ones")

    def config(self) -> lora.LoraConfig:
        """The model room's form of it."""
        return lora.LoraConfig(self.rank, self.alpha, self.targets or "all-linear")
