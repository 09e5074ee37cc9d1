"""Shapes by name and by size. Enters: a preset, or a number of weights; leaves: a `Shape`.

Counts depend on the vocabulary: the names of the presets are true at `VOCABULARY` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from microlm.core.errors import UserError
from microlm.core.recipe import nearest
from microlm.model.config import ModelConfig, ModelType

PresetName = Literal["4m", "26m", "31m", "64m", "110m"]
VOCABULARY = 6400
TOLERANCE = 0.03  # of the size that was asked for
ASPECT = 64  # width over depth, as the dial aims
MLP_RATIO = 8 / 3  # width of the SwiGLU over the model's


@dataclass(frozen=True)
class Shape:
    """What makes a decoder's size; widths in elements."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    model_type: ModelType = "qwen3"
    tied: bool = False

    def config(
        self,
        vocab_size: int,
        positions: int,
        rope_theta: float,
        eos: int | None = None,
        pad: int | None = None,
    ) -> ModelConfig:
        """The stock configuration of this shape."""
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=positions,
            rope_theta=rope_theta,
            model_type=self.model_type,
            tie_word_embeddings=self.tied,
            eos_token_id=eos,
            pad_token_id=pad,
        )

    def parameters(self, vocab_size: int) -> int:
        """All weights at a vocabulary."""
        return self.config(vocab_size, 1, 1.0).parameters


PRESETS: dict[PresetName, Shape] = {
    "4m": Shape(192, 4, 6, 2, 32, 512),
    "26m": Shape(512, 8, 8, 2, 64, 1408, "llama", tied=True),  # YuanMeng's, which is minimind2-small's
    "31m": Shape(512, 8, 8, 8, 64, 1344, "llama"),  # the first MicroLM's
    "64m": Shape(768, 8, 8, 4, 96, 2432, tied=True),  # minimind-3's
    "110m": Shape(768, 16, 12, 4, 64, 2176, tied=True),
}
POSITIONS = 2048
THETA: dict[PresetName, float] = {"4m": 1e4, "26m": 1e6, "31m": 1e4, "64m": 1e6, "110m": 1e4}


def preset_fields(name: PresetName) -> dict[str, Any]:
    """A preset as the fields of an architecture recipe."""
    return {**asdict(PRESETS[name]), "max_positions": POSITIONS, "rope_theta": THETA[name]}


def named_shape(word: str) -> Shape:
    """A preset by its name, or HIDDENxLAYERS: heads of 64, a SwiGLU of the usual width."""
    known: dict[str, Shape] = {str(name): shape for name, shape in PRESETS.items()}
    if word in known:
        return known[word]
    hidden, _, layers = word.partition("x")
    if not (hidden.isdecimal() and layers.isdecimal()):
        raise UserError(f"model '{word}': {nearest(word, known)}, or HIDDENxLAYERS such as 512x8")
    width, depth = int(hidden), int(layers)
    if width < 64 or width % 64 or not 1 <= depth <= 1000:
        raise UserError(f"model '{word}': hidden must be a multiple of 64, layers 1 to 1000")
    return Shape(width, depth, width // 64, width // 64, 64, swiglu(width))


def shape_of_size(budget: int, vocab_size: int, fixed: Mapping[str, Any]) -> Shape:
    """The best proportioned shape of about `budget` weights; `fixed` fields stay as they are.

    UserError when none comes within 3 %.
    """
    shapes = list(_candidates(budget, vocab_size, fixed))
    if not shapes:
        raise UserError(
            f"architecture: no model of {budget:,} weights has {_told(fixed)} and a vocabulary of "
            f"{vocab_size:,}; raise the size, or leave some of it out"
        )

    def miss(shape: Shape) -> float:
        return abs(shape.parameters(vocab_size) / budget - 1)

    fitting = [s for s in shapes if miss(s) <= TOLERANCE]
    if not fitting:
        nearest = min(shapes, key=miss)
        raise UserError(
            f"architecture: size {budget:,} cannot be met with {_told(fixed)}, a vocabulary of "
            f"{vocab_size:,} and the usual proportions; the nearest has {nearest.parameters(vocab_size):,} "
            "weights: change the size, or leave some of it out"
        )
    return min(fitting, key=lambda s: (_ill_proportioned(s) + 20 * miss(s), asdict(s).values()))


def _ill_proportioned(shape: Shape) -> float:
    """How far depth, heads and SwiGLU are from the usual proportions, in doublings; 0 is best."""
    aspect = abs(math.log2(shape.hidden_size / shape.layers / ASPECT))
    aspect += shape.heads == shape.kv_heads > 1  # no grouping divides them, or it was asked for
    return aspect + 2 * abs(math.log2(shape.intermediate_size / (MLP_RATIO * shape.hidden_size)))


def _candidates(budget: int, vocab_size: int, fixed: Mapping[str, Any]) -> Iterator[Shape]:
    """A shape for every width and depth, its SwiGLU as wide as the budget asks within ± 25 % of the usual."""
    head_dim = fixed.get("head_dim") or (32 if budget < 10_000_000 else 64)
    for heads in [fixed["heads"]] if "heads" in fixed else range(1, 129):
        hidden = fixed.get("hidden_size") or heads * head_dim
        if "heads" not in fixed and "hidden_size" in fixed and heads != max(1, hidden // head_dim):
            continue
        if hidden * vocab_size > budget:
            break
        kv_heads = fixed.get("kv_heads") or grouped(heads)
        if heads % kv_heads:
            continue
        tied = fixed.get("tied", 2 * vocab_size * hidden > budget / 4)
        for layers in [fixed["layers"]] if "layers" in fixed else range(2, 65):
            rest = (fixed.get("model_type", "qwen3"), tied)
            bare = Shape(hidden, layers, heads, kv_heads, head_dim, 0, *rest)
            left = budget - bare.parameters(vocab_size)
            width = fixed.get("intermediate_size") or swiglu(hidden, left / (3 * hidden * layers))
            yield Shape(hidden, layers, heads, kv_heads, head_dim, width, *rest)


def grouped(heads: int) -> int:
    """Key-value heads for a number of heads: half, a third or a quarter of them where that divides."""
    return next((heads // n for n in (2, 3, 4) if heads % n == 0), heads)


def swiglu(hidden: int, wanted: float | None = None) -> int:
    """The width of a SwiGLU, in whole vectors: the usual 8/3 of the model's, or near `wanted`."""
    step = 64 if hidden >= 256 else 32
    usual = MLP_RATIO * hidden
    width = usual if wanted is None else min(max(wanted, 0.75 * usual), 1.25 * usual)
    return max(step, round(width / step) * step)


def _told(fixed: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in fixed.items() if k != "model_type") or "any shape"
