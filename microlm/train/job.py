"""What a run is made of: the recipe of its loop, and a `Job` that binds it to data, objective and folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from microlm.core import runtime
from microlm.core.artifact import LOGS, RESUME
from microlm.core.recipe import Recipe, unkeyed
from microlm.train import optim
from microlm.train.batches import PackedRows
from microlm.train.objectives import Objective


class LoopRecipe(Recipe):
    """How long, how much at once, how precise."""

    tokens: int = Field(default=2_000_000, ge=1, description="positions to train on, padding included")
    context: int = Field(default=256, ge=16, description="tokens of a row")
    batch_rows: int = Field(default=16, ge=1, description="rows of a step, over all processes")
    micro_rows: int = Field(default=8, ge=1, description="rows of one forward pass")
    document_mask: bool = Field(
        default=True, description="a document sees only itself, not those before it in its row"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="precision of the products"
    )
    compile: bool = Field(default=True, description="torch.compile (faster; needs a C++ compiler)")
    workers: int = unkeyed(1, ge=0, le=64, description="threads that make batches ahead of time; 0: none")
    checkpoint_steps: int = unkeyed(100, ge=1, description="steps between resume checkpoints")
    log_steps: int = unkeyed(10, ge=1, description="steps between logged rows")
    validation_steps: int = unkeyed(200, ge=1, description="steps between validations")
    validation_rows: int = unkeyed(32, ge=0, description="rows of one validation; 0 for none")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.tokens // (self.batch_rows * self.context))

    def compiles(self) -> bool:
        """Whether blocks are compiled: asked for, and possible here."""
        return self.compile and runtime.missing_for_compile() is None

    def compute_dtype(self) -> torch.dtype:
        """The torch dtype; auto takes bf16 where it is native."""
        if self.dtype == "auto":
            return torch.bfloat16 if runtime.has_fast_bfloat16() else torch.float32
        return runtime.torch_dtype(self.dtype)


@dataclass
class Job:
    """What a run needs besides the decoder; `folder` is the stage's workspace."""

    loop: LoopRecipe
    optim: optim.OptimRecipe
    objective: Objective
    train: PackedRows
    validation: PackedRows | None
    folder: Path
    name: str

    @property
    def resume(self) -> Path:
        """Where the checkpoints lie."""
        return self.folder / RESUME

    @property
    def logs(self) -> Path:
        """Where the metrics lie."""
        return self.folder / LOGS
