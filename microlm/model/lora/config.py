"""What an adapter is: its size, its place, its scale, and how the base under it is held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from microlm.core.errors import UserError

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Base = Literal["as_loaded", "compute", "int8"]
"""The frozen weights: as they came; in the precision of the products; the blocks' matrices as int8."""


@dataclass(frozen=True)
class LoraConfig:
    """The size and place of an adapter; the update is `scale · B A`, less a share `dropout` of inputs."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    dropout: float = 0.0
    rslora: bool = False
    base: Base = "as_loaded"

    @property
    def scale(self) -> float:
        """alpha / rank; rank-stabilised (2312.03732): alpha / √rank."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the matrices that are adapted, or the ends of their names."""
        return ALL_LINEAR if isinstance(self.targets, str) else self.targets

    def fits(self, name: str) -> bool:
        """Whether a matrix is adapted: a target is its whole name or ends it at a dot, as in PEFT."""
        return any(f".{name}".endswith(f".{target}") for target in self.modules)

    def require_fit(self, names: Iterable[str]) -> None:
        """Refuse a size that is none, and targets that are none of the matrices `names`."""
        if self.rank < 1:
            raise UserError(f"lora: rank is {self.rank}; set it to 1 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora: dropout is {self.dropout:g}; set it to 0 or more, and less than 1")
        known = [f".{name}" for name in names]
        for target in self.modules:
            if not any(name.endswith(f".{target}") for name in known):
                raise UserError(
                    f"lora: the model has no matrix '{target}'; choose from {', '.join(ALL_LINEAR)}"
                )
