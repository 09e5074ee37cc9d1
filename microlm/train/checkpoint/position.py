"""Where a run stands between two steps: all of it that is no tensor, as JSON values."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch


@dataclass
class Position:
    """The next step; what was seen, logged and left out so far; the data's place; every random state."""

    step: int = 0
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    recent: list[list[float]] = field(default_factory=list)  # loss and metrics of the last steps
    owed: dict[str, float] = field(default_factory=dict)  # the row of this step, not written yet
    data: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    left_out: int = 0  # batches whose step was not kept
    nonfinite: list[dict[str, Any]] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)  # what differed when it was resumed all the same

    def become(self, other: Position) -> None:
        """Take over another position in place: those who hold this one see it move."""
        for f in fields(self):
            setattr(self, f.name, getattr(other, f.name))

    def to_json(self) -> dict[str, Any]:
        """Plain values, apart from ours."""
        return asdict(self)

    @property
    def validation_loss(self) -> float | None:
        """The loss of a validation at this very step."""
        last = self.history[-1] if self.history else {}
        return last.get("validation_loss") if last.get("step") == self.step else None


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, numpy, torch and (where there is one) the GPU."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    found = {
        "python": [version, np.asarray(words, "<u4").tobytes().hex(), gauss],
        "numpy": [legacy[0], np.asarray(legacy[1], "<u4").tobytes().hex(), *legacy[2:]],
        "torch": _to_hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        found["cuda"] = _to_hex(torch.cuda.get_rng_state())
    return found


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to a state of `random_state`; that of a GPU is left alone where there is none."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(np.frombuffer(bytes.fromhex(words), "<u4").tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.frombuffer(bytes.fromhex(keys), "<u4"), *rest))
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
