"""Stage `dpo`: preference pairs → a model, or an adapter, that gives the preferred answers more probability.

Architecture, tokenizer, template and the reference come from the input model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from microlm.core import runtime
from microlm.core.artifact import Workspace, stage
from microlm.core.errors import UserError
from microlm.core.manifest import Artifact
from microlm.core.recipe import StageRecipe, artifact_input
from microlm.model import directory
from microlm.model.transformer import Decoder
from microlm.text.shards import open_sets
from microlm.train import memory
from microlm.train.batches.pairs import PairRows, TooLongPair, held_out_pairs, pair_rows
from microlm.train.job import Job, LoopRecipe, Sampler, fingerprint
from microlm.train.objectives import dpo
from microlm.train.optim import OptimRecipe
from microlm.train.pretrain import TOKENIZER, finish, require_same_chat
from microlm.train.ranks import Ranks, launch, processes, warn_idle
from microlm.train.reporter import tell_lengths
from microlm.train.tuning import lora_recipe
from microlm.train.tuning.leaving import kind_of, train_and_leave, weights_saver
from microlm.train.tuning.lora_recipe import LoraRecipe
from microlm.train.tuning.reference import add_references


class DpoRecipe(StageRecipe):
    """Tune a model on pairs of a preferred and a rejected answer (2305.18290)."""

    model: str = artifact_input(
        kinds=("model",), description="model artifact to start from, the reference too"
    )
    shards: str = artifact_input(kinds=("shards",), description="shards artifact with preferences")
    mixture: dict[str, float] = Field(
        default={}, description="task → share of the tokens; empty: all preferences, equal"
    )
    beta: float = Field(
        default=0.1, gt=0, le=10, description="how closely the model stays with the reference"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="share of pairs that are taken to be the wrong way round"
    )
    nll_share: float = Field(
        default=0.0, ge=0, description="weight of the chosen answer's own loss per label, added to each pair"
    )
    too_long: TooLongPair = Field(
        default="drop", description="pairs longer than loop.context: left out, or both prompts cut alike"
    )
    lora: LoraRecipe | None = Field(
        default=None, description="train an adapter of this shape; none: all weights"
    )
    loop: LoopRecipe = Field(default=LoopRecipe(), description="length, batch, precision")
    optim: OptimRecipe = Field(default=OptimRecipe(), description="rates and schedule")

    @field_validator("loop")
    @classmethod
    def _apart(cls, value: LoopRecipe) -> LoopRecipe:
        if not value.document_mask:
            raise ValueError("the answers of a pair lie in one row and must not see each other; leave out "
                             "document_mask: false")  # fmt: skip
        return value


VERSION = 1


@stage("dpo", kind_of, VERSION)
def run(recipe: DpoRecipe, work: Workspace, sample: Sampler | None = None) -> None:
    """Load the model, compute the reference, train on every rank, save weights or adapter.

    `sample` writes texts on the way.
    """
    model, shards = work.inputs["model"], work.inputs["shards"]
    require_same_chat(model, shards)
    memory.check(directory.read_config(model.path), recipe, recipe.lora.config() if recipe.lora else None)
    work.processes = processes(recipe.parallel)
    warn_idle("dpo", recipe.parallel, recipe.loop.batch_rows, recipe.loop.micro_rows)
    made_for = fingerprint(f"dpo {VERSION}", recipe, work.inputs, model.file(TOKENIZER))
    if launch(recipe.parallel, _rank, recipe, model, shards.path, work.path, made_for, sample):
        finish(work, model.path)


def _rank(
    ranks: Ranks,
    recipe: DpoRecipe,
    model: Artifact,
    shards: Path,
    out: Path,
    made_for: Mapping[str, Any],
    sample: Sampler | None,
) -> None:
    decoder, job = prepare(recipe, model, shards, out)
    job.fingerprint, job.sampler = made_for, sample
    if ranks.rank == 0:
        tell_lengths(job)
    add_references(ranks, decoder, job, reference_of(recipe, made_for))
    train_and_leave(ranks, decoder, job)


def prepare(recipe: DpoRecipe, model: Artifact, shards: Path, out: Path) -> tuple[Decoder, Job]:
    """The decoder as tuning begins, and the job that binds it to the pairs and the folder `out`."""
    runtime.set_seed(recipe.seed)
    decoder = lora_recipe.load(model.path, recipe.loop.compute_dtype(), recipe.lora, recipe.seed)
    rows, validation = open_pairs(recipe, shards)
    objective = dpo.make(recipe.beta, recipe.label_smoothing, recipe.nll_share)
    job = Job(recipe.loop, recipe.optim, objective, rows, validation, out, "dpo")
    job.tokenizer, job.save_weights = shards / "tokenizer", weights_saver(recipe, model)
    return decoder, job


def open_pairs(recipe: DpoRecipe, shards: Path) -> tuple[PairRows, PairRows | None]:
    """The rows that are trained on, and the held-out ones."""
    sets, held_out = (open_sets(shards, "preferences-", split) for split in ("train", "validation"))
    if not sets:
        raise UserError(
            f"{shards}: holds no preferences; give the data stage records with prompt, chosen and rejected, "
            "and tokenize it again"
        )
    context = recipe.loop.context
    rows = pair_rows(sets, recipe.mixture, context, recipe.seed, recipe.too_long)
    return rows, held_out_pairs(held_out, recipe.mixture, context, recipe.too_long)


def reference_of(recipe: DpoRecipe, made_for: Mapping[str, Any]) -> dict[str, Any]:
    """What the reference's numbers depend on, besides the machine: the inputs, and how pairs become rows."""
    loop = recipe.loop
    return {
        "inputs": made_for["inputs"],
        "mixture": recipe.mixture,
        "too_long": recipe.too_long,
        "context": loop.context,
        "dtype": str(loop.compute_dtype()),
    }
