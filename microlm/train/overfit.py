"""Trials before a run: one batch learnt by heart, and real steps timed. Nothing of them stays.

Enters: a recipe whose inputs are finished. Leaves: the rows of metrics, and what they mean.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from microlm.core.artifact import LOGS, RESUME
from microlm.core.errors import CheckFailed
from microlm.core.manifest import open_artifact
from microlm.core.metrics import FILE, read_metrics
from microlm.core.recipe import Parallel
from microlm.model.transformer import Decoder
from microlm.train import pretrain
from microlm.train.batches import Batch, PackedRows
from microlm.train.job import Job, SamplesRecipe
from microlm.train.loop import train
from microlm.train.plan import Trainable
from microlm.train.ranks import Ranks, launch
from microlm.train.tuning import distil, dpo, sft
from microlm.train.tuning.distil import DistilRecipe
from microlm.train.tuning.dpo import DpoRecipe
from microlm.train.tuning.reference import add_references
from microlm.train.tuning.sft import SftRecipe

STEPS, ROWS, TARGET = 300, 2, 0.05
TIMED_STEPS, COLD_STEPS = 8, 3
Rows = list[dict[str, float]]


class OneBatch(PackedRows):
    """The first batch of other rows, again and again."""

    def __init__(self, rows: PackedRows, count: int) -> None:
        self.__dict__.update(rows.__dict__)
        with rows.batches(count) as stream:
            self._first = next(stream)

    def assemble(self, rows: object) -> Batch:
        """The same batch, whatever was planned."""
        return self._first


@dataclass(frozen=True)
class Overfit:
    """Losses in nats a label: at the first step, at the last ten on average, and the lowest."""

    first: float
    last: float
    lowest: float
    steps: int
    target: float
    steps_to_target: int | None
    tokens_per_s: float

    @property
    def ok(self) -> bool:
        """Whether the batch was learnt."""
        return self.last < self.target

    def sentence(self) -> str:
        """What happened; where it failed, what to suspect."""
        fell = f"one batch: loss {self.first:.3f} → {self.last:.4f} in {self.steps} steps"
        if self.ok:
            return f"{fell} (below {self.target:g} after {self.steps_to_target})"
        return f"{fell}, not below {self.target:g}; {self._suspicion()}"

    def _suspicion(self) -> str:
        if self.last > 0.9 * self.first:
            return "it hardly moves: suspect rates far too low or too high (optim.*), or frozen weights"
        if self.last > 1.5 * self.lowest and self.last - self.lowest > 0.1:
            return f"it was at {self.lowest:.3f} and rose again: suspect rates that are too high (optim.*)"
        return (
            "it falls too slowly: suspect low rates, weight decay or a long warm-up (optim.*), a model that "
            "is too small, or labels that contradict each other (equal beginnings that go on differently)"
        )


def overfit(recipe: Trainable, steps: int = STEPS, rows: int = ROWS, target: float = TARGET) -> Overfit:
    """Train on the first `rows` rows alone, at full rates: what is sound learns them by heart."""
    loop = recipe.loop.model_copy(
        update={"tokens": steps * rows * recipe.loop.context, "batch_rows": rows, "micro_rows": rows}
    )
    rates = recipe.optim.model_copy(update={"schedule": "constant"})
    alone = Parallel(processes=1, threads=recipe.parallel.threads)
    changes = {"loop": loop, "optim": rates, "parallel": alone} | _learnable(recipe)
    once = recipe.model_copy(update=changes)
    found = trial(once, repeat=True)
    losses = [row["loss"] for row in found if "loss" in row]
    below = next((i for i, loss in enumerate(losses, 1) if loss < target), None)
    speed = statistics.median([r["tokens_per_s"] for r in found if "tokens_per_s" in r])
    last = statistics.fmean(losses[-10:])
    return Overfit(losses[0], last, min(losses), len(losses), target, below, speed)


def _learnable(recipe: Trainable) -> dict[str, float]:
    """What lets a batch learnt by heart have a loss of zero: the labels alone, all of them right."""
    if isinstance(recipe, DistilRecipe):
        return {"alpha": 0.0}  # a share of the teacher's entropy would stay
    return {"label_smoothing": 0.0} if isinstance(recipe, DpoRecipe) else {}


def require_overfit(found: Overfit) -> None:
    """CheckFailed when the batch was not learnt."""
    if not found.ok:
        raise CheckFailed(found.sentence())


def tokens_per_s(recipe: Trainable) -> float:
    """The speed of some real steps of a run, on its own processes, after the first ones."""
    loop = recipe.loop
    timed = loop.model_copy(update={"tokens": TIMED_STEPS * loop.batch_rows * loop.context})
    found = trial(recipe.model_copy(update={"loop": timed}), repeat=False)
    speeds = [row["tokens_per_s"] for row in found if "tokens_per_s" in row]
    return statistics.median(speeds[COLD_STEPS:])


def trial(recipe: Trainable, repeat: bool) -> Rows:
    """Train by a recipe in a folder that is thrown away; the rows of every step. `repeat`: one batch only."""
    quiet = {
        "log_steps": 1, "validation_rows": 0, "checkpoint_steps": recipe.loop.steps + 1, "keep": 1,
        "keep_best": False, "samples": SamplesRecipe(), "tracker": "none", "nonfinite": "stop",
    }  # fmt: skip
    recipe = recipe.model_copy(update={"loop": recipe.loop.model_copy(update=quiet)})
    with tempfile.TemporaryDirectory(prefix="microlm-trial-") as name:
        folder = Path(name)
        for part in (RESUME, LOGS):
            (folder / part).mkdir()
        launch(recipe.parallel, _rank, recipe, repeat, folder)
        return read_metrics(folder / LOGS / FILE)


def _rank(ranks: Ranks, recipe: Trainable, repeat: bool, folder: Path) -> None:
    decoder, job = _prepare(recipe, folder)
    job.validation = job.tokenizer = None
    if repeat:
        if isinstance(recipe, DpoRecipe):
            add_references(ranks, decoder, job, {})
        assert isinstance(job.train, PackedRows)
        job.train = OneBatch(job.train, recipe.loop.batch_rows)
    train(ranks, decoder, job)


def _prepare(recipe: Trainable, folder: Path) -> tuple[Decoder, Job]:
    shards = open_artifact(recipe.shards)
    model = open_artifact(recipe.model) if recipe.model else None
    if isinstance(recipe, SftRecipe | DpoRecipe):
        assert model
        pretrain.require_same_chat(model, shards)
        if isinstance(recipe, DpoRecipe):
            return dpo.prepare(recipe, model, shards.path, folder)
        return sft.prepare(recipe, model, shards.path, folder)
    if model:
        pretrain.require_same_tokenizer(model, shards)
    if isinstance(recipe, DistilRecipe):
        distil.require_teacher(open_artifact(recipe.teacher), shards, recipe.loop.context)
        return distil.prepare(recipe, {k: open_artifact(v) for k, v in recipe.inputs().items()}, folder)
    config = pretrain.configuration(recipe, shards, model)
    return pretrain.prepare(recipe, config, model.path if model else None, shards.path, folder)
