"""The `architecture:` block of a pretrain recipe: a preset, a size or a whole shape → `ModelConfig`."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import Field, field_validator, model_validator

from microlm.core.recipe import Recipe
from microlm.model.config import ModelConfig, ModelType
from microlm.model.presets import POSITIONS, PresetName, Shape, preset_fields, shape_of_size, swiglu

MAX_WEIGHTS = 8_000_000_000  # each process holds them all, their gradients and two moments
_CORE = ("hidden_size", "layers", "heads", "intermediate_size")  # who changes two of them has another model
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


class ArchitectureRecipe(Recipe):
    """The shape of the model: `preset` or `size`, or its fields; one of them may differ from the preset."""

    preset: PresetName | None = Field(default=None, description="a named shape; fills every field below")
    size: int | None = Field(
        default=None,
        ge=100_000,
        le=MAX_WEIGHTS,
        description="weights in all (40m); the shape follows from it",
    )
    model_type: ModelType = Field(default="qwen3", description="stock architecture")
    hidden_size: int | None = Field(default=None, ge=8, le=16_384, description="width")
    layers: int | None = Field(default=None, ge=1, le=256, description="blocks")
    heads: int | None = Field(default=None, ge=1, le=256, description="query heads")
    kv_heads: int | None = Field(
        default=None, ge=1, le=256, description="key-value heads; none: as many as heads, fewer by size"
    )
    head_dim: int | None = Field(
        default=None, ge=2, le=512, description="size of a head, even; none: the heads' share of the width"
    )
    intermediate_size: int | None = Field(
        default=None, ge=8, le=65_536, description="width of the SwiGLU; none: 8/3 of the model's"
    )
    max_positions: int = Field(default=384, ge=16, le=1 << 20, description="longest sequence, in tokens")
    rope_theta: float = Field(default=10_000.0, ge=1, le=1e9, description="rotary base")
    tied: bool | None = Field(
        default=None, description="share embedding and head; none: no, or by size where they are large"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """A preset's values where the recipe states none, so that the resolved recipe shows the shape."""
        if not isinstance(data, dict):
            return data
        given = {k: v for k, v in data.items() if v is not None}
        if "preset" in given and "size" in given:
            raise ValueError(
                f"preset {given['preset']} and size {given['size']} state the model twice; keep one"
            )
        if "size" in given:
            return {"max_positions": POSITIONS, **given}
        if given.get("preset") in get_args(PresetName):
            filled = preset_fields(given["preset"])
            other = [f"{n} {given[n]}" for n in _CORE if n in given and given[n] != filled[n]]
            if len(other) > 1:
                twice = f"preset {given['preset']} and {', '.join(other)}"
                raise ValueError(
                    f"{twice} state the model twice; keep one (architecture={{preset: "
                    f"{given['preset']}}} on the command line replaces the whole block)"
                )
            return {**filled, **given}
        return given

    @field_validator("size", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        """`40m`, `1.5b`, `800k` → a number of weights."""
        found = (
            re.fullmatch(r"(\d+(?:\.\d+)?)([kmb])", value.strip().lower()) if isinstance(value, str) else None
        )
        return round(float(found[1]) * _UNITS[found[2]]) if found else value

    @model_validator(mode="after")
    def _possible(self) -> ArchitectureRecipe:
        if self.size is None:
            missing = [n for n in ("hidden_size", "layers", "heads") if getattr(self, n) is None]
            if missing:
                names = ", ".join(get_args(PresetName))
                raise ValueError(f"{missing[0]} is missing; give a preset ({names}), a size, or the shape")
        if (self.head_dim or 2) % 2 or (self.heads and self.kv_heads and self.heads % self.kv_heads):
            raise ValueError("heads must be a multiple of kv_heads, and head_dim even")
        if self.size is None:
            self._require_trainable(self.shape(0))
        return self

    def _require_trainable(self, shape: Shape) -> None:
        if shape.head_dim < 2 or shape.head_dim % 2:
            raise ValueError(
                f"hidden_size {shape.hidden_size} over {shape.heads} heads is no even head_dim; give head_dim"
            )
        if (weights := shape.parameters(0)) > MAX_WEIGHTS:
            raise ValueError(
                f"a shape of {weights / 1e9:,.1f} billion weights without the embedding, at most "
                f"{MAX_WEIGHTS / 1e9:g} billion are trained; lower hidden_size, intermediate_size or layers"
            )

    def shape(self, vocab_size: int) -> Shape:
        """The whole shape; by size it depends on the vocabulary."""
        if self.size is not None:
            stated = {n: getattr(self, n) for n in Shape.__dataclass_fields__}
            fixed = {n: value for n, value in stated.items() if value is not None}
            return shape_of_size(self.size, vocab_size, fixed)
        assert self.hidden_size and self.layers and self.heads
        return Shape(
            self.hidden_size,
            self.layers,
            self.heads,
            self.kv_heads or self.heads,
            self.head_dim or self.hidden_size // self.heads,
            self.intermediate_size or swiglu(self.hidden_size),
            self.model_type,
            bool(self.tied),
        )

    def config(self, index: dict[str, Any]) -> ModelConfig:
        """The stock configuration for a tokenizer's shards; the vocabulary is padded to a multiple of 64."""
        vocab_size = (index["vocab_size"] + 63) // 64 * 64
        shape = self.shape(vocab_size)
        return shape.config(
            vocab_size, self.max_positions, self.rope_theta, index["eos_token_id"], index["pad_token_id"]
        )
