"""Rotary scaling for contexts beyond the trained length. Enters: HF's `rope_parameters`; leaves: frequencies.

`linear` and `llama3` as transformers computes them. `dynamic` is refused: its angles depend on the length of
the whole sequence, so keys that lie in a cache would have to be turned again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from microlm.core.errors import UserError

RopeType = Literal["linear", "llama3"]


@dataclass(frozen=True)
class RopeScaling:
    """HF's names; the last three are for llama3: `original_max_position_embeddings` is the trained length."""

    rope_type: RopeType
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0

    def to_hf(self) -> dict[str, Any]:
        """The keys that transformers expects of this type, the base apart."""
        if self.rope_type == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return dict(self.__dict__)


def read_scaling(rope: Mapping[str, Any], positions: int, where: str) -> RopeScaling | None:
    """The scaling in HF's `rope_parameters` (or older `rope_scaling`), None for none; others are refused."""
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"{where}: rotary parameters by kind of layer are not supported; use another model")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in (None, "default"):
        return None
    if kind not in get_args(RopeType):
        raise UserError(
            f"{where}: rotary scaling {kind!r} is not supported; use a model with none, linear or llama3"
        )
    if kind == "linear":
        return _checked(RopeScaling("linear", float(rope["factor"])), where)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    trained = int(rope.get("original_max_position_embeddings") or positions)
    return _checked(RopeScaling("llama3", float(rope["factor"]), low, high, trained), where)


def _checked(scaling: RopeScaling, where: str) -> RopeScaling:
    if not (math.isfinite(scaling.factor) and scaling.factor >= 1):
        raise UserError(f"{where}: the rotary factor is {scaling.factor}; it must be at least 1")
    if scaling.rope_type == "llama3" and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise UserError(
            f"{where}: low_freq_factor {scaling.low_freq_factor} and high_freq_factor "
            f"{scaling.high_freq_factor} do not fit; both must be above 0, the high one larger"
        )
    return scaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians a position, of each pair of dimensions [d/2] (RoFormer, 2104.09864; Llama 3, 2407.21783)."""
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.rope_type == "linear":
        return slow
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / (2 * math.pi / plain)  # within the trained length
    share = ((turns - low) / (high - low)).clamp(0, 1)  # of the unscaled frequency
    return (1 - share) * slow + share * plain
