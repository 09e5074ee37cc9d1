"""What a run is made of: the recipe of its loop, and a `Job` that binds it to data, objective and folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from microlm.core import runtime
from microlm.core.artifact import LOGS, RESUME
from microlm.core.manifest import Artifact, hash_file
from microlm.core.recipe import Recipe, StageRecipe, unkeyed
from microlm.model import directory
from microlm.model.transformer import Decoder
from microlm.train import optim
from microlm.train.batches import Rows
from microlm.train.checkpoint import SavePlan, SaveWeights
from microlm.train.objectives import Objective


class SamplesRecipe(Recipe):
    """What the model is asked to go on with while it is trained."""

    steps: int = Field(default=0, ge=0, description="steps between samples; 0: none")
    prompts: tuple[str, ...] = Field(default=(), max_length=32, description="beginnings of texts")
    tokens: int = Field(default=64, ge=1, le=4096, description="new tokens of each sample")

    @model_validator(mode="after")
    def _has_prompts(self) -> SamplesRecipe:
        if self.steps and not all(self.prompts or [""]):
            raise ValueError("steps asks for samples; give prompts: beginnings of texts, none empty")
        return self


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
    activation_checkpointing: bool = unkeyed(
        False, description="keep only the blocks' inputs, compute the rest twice: less memory, slower"
    )
    workers: int = unkeyed(1, ge=0, le=64, description="threads that make batches ahead of time; 0: none")
    checkpoint_steps: int = unkeyed(100, ge=1, description="steps between resume checkpoints")
    keep: int = unkeyed(2, ge=1, description="resume checkpoints that are kept")
    keep_best: bool = Field(
        default=False, description="also keep the weights of the lowest validation loss, in best/"
    )
    allow_mismatch: bool = unkeyed(
        False, description="go on from a checkpoint of other settings or data; the manifest tells it"
    )
    nonfinite: Literal["stop", "skip", "roll_back"] = unkeyed(
        "stop", description="what to do when a loss or gradient is not finite"
    )
    nonfinite_limit: int = unkeyed(10, ge=0, description="how often that may happen in a run")
    log_steps: int = unkeyed(10, ge=1, description="steps between logged rows")
    validation_steps: int = unkeyed(200, ge=1, description="steps between validations")
    validation_rows: int = unkeyed(32, ge=0, description="rows of one validation; 0 for none")

    samples: SamplesRecipe = unkeyed(SamplesRecipe(), description="texts that the model writes on the way")
    tracker: Literal["none", "wandb", "trackio"] = unkeyed("none", description="who else gets the metrics")

    @field_validator("tracker")
    @classmethod
    def _installed(cls, value: str) -> str:
        if value != "none" and importlib.util.find_spec(value) is None:
            raise ValueError(f"{value} is not installed; pip install {value}, or leave tracker out")
        return value

    def keyed(self) -> dict[str, Any]:
        """With what the best weights are chosen by, where they are kept: on which rows, how often."""
        chosen_by = ("validation_steps", "validation_rows") if self.keep_best else ()
        return super().keyed() | {name: getattr(self, name) for name in chosen_by}

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
            on_gpu = runtime.device().type == "cuda"
            fast = torch.cuda.is_bf16_supported() if on_gpu else runtime.has_fast_bfloat16()
            return torch.bfloat16 if fast else torch.float32
        return runtime.torch_dtype(self.dtype)


Sampler = Callable[[Decoder, Path, Sequence[str], int, Callable[[], None]], list[str]]
"""`(decoder, tokenizer's directory, prompts, new tokens, check) → texts`; the engine's, passed in from above.

`check` is called between tokens; what it raises ends the writing.
"""


@dataclass
class Job:
    """What a run needs besides the decoder; `folder` is the stage's workspace.

    With the tokenizer's directory, validation is also told in bits per byte.
    """

    loop: LoopRecipe
    optim: optim.OptimRecipe
    objective: Objective
    train: Rows
    validation: Rows | None
    folder: Path
    name: str
    save_weights: SaveWeights = directory.save
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    sampler: Sampler | None = None

    @property
    def checkpoints(self) -> SavePlan:
        """How checkpoints are written."""
        loop = self.loop
        return SavePlan(self.resume, loop.keep, loop.keep_best, self.save_weights, self.fingerprint)

    @property
    def resume(self) -> Path:
        """Where the checkpoints lie."""
        return self.folder / RESUME

    @property
    def logs(self) -> Path:
        """Where the metrics lie."""
        return self.folder / LOGS


def fingerprint(
    stage: str, recipe: StageRecipe, inputs: Mapping[str, Artifact], tokenizer: Path
) -> dict[str, Any]:
    """What a checkpoint is good for: this stage and version, these settings, these bytes."""
    return {
        "stage": stage,
        "recipe": recipe.keyed(),
        "inputs": {name: artifact.digest for name, artifact in inputs.items()},
        "tokenizer": hash_file(tokenizer),
    }
