"""Stage `sft`: conversations → a tuned model, or (with a `lora:` block) an adapter of the input model.

Architecture, tokenizer, template come from the input artifact; labels are assistant tokens and their EOS.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from microlm.core import runtime
from microlm.core.artifact import Workspace, stage
from microlm.core.manifest import Artifact
from microlm.core.recipe import StageRecipe, artifact_input
from microlm.model import directory
from microlm.model.transformer import Decoder
from microlm.text.shards import open_sets
from microlm.train import memory, objectives
from microlm.train.batches import PackedRows, TooLong, held_out_rows
from microlm.train.job import Job, LoopRecipe, Sampler, fingerprint
from microlm.train.optim import OptimRecipe
from microlm.train.pretrain import TOKENIZER, finish, require_same_chat
from microlm.train.ranks import Ranks, launch, processes, warn_idle
from microlm.train.reporter import tell_lengths
from microlm.train.tuning import lora_recipe
from microlm.train.tuning.leaving import kind_of, train_and_leave, weights_saver
from microlm.train.tuning.lora_recipe import LoraRecipe


class SftRecipe(StageRecipe):
    """Tune a model on conversations."""

    model: str = artifact_input(kinds=("model",), description="model artifact to start from")
    shards: str = artifact_input(kinds=("shards",), description="shards artifact with conversations")
    mixture: dict[str, float] = Field(
        default={}, description="task (or documents) → share of the tokens; empty: all conversations, equal"
    )
    too_long: TooLong = Field(
        default="drop",
        description="conversations longer than loop.context: left out, cut on one side, or split",
    )
    lora: LoraRecipe | None = Field(
        default=None, description="train an adapter of this shape; none: all weights"
    )
    loop: LoopRecipe = Field(default=LoopRecipe(), description="length, batch, precision")
    optim: OptimRecipe = Field(default=OptimRecipe(), description="rates and schedule")


VERSION = 5


@stage("sft", kind_of, VERSION)
def run(recipe: SftRecipe, work: Workspace, sample: Sampler | None = None) -> None:
    """Load the model, train on every rank, save weights or adapter with the model's own tokenizer files.

    `sample` writes texts on the way.
    """
    model, shards = work.inputs["model"], work.inputs["shards"]
    require_same_chat(model, shards)
    memory.check(directory.read_config(model.path), recipe, recipe.lora.config() if recipe.lora else None)
    work.processes = processes(recipe.parallel)
    warn_idle("sft", recipe.parallel, recipe.loop.batch_rows, recipe.loop.micro_rows)
    made_for = fingerprint(f"sft {VERSION}", recipe, work.inputs, model.file(TOKENIZER))
    if launch(recipe.parallel, _rank, recipe, model, shards.path, work.path, made_for, sample):
        finish(work, model.path)


def _rank(
    ranks: Ranks,
    recipe: SftRecipe,
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
    train_and_leave(ranks, decoder, job)


def prepare(recipe: SftRecipe, model: Artifact, shards: Path, out: Path) -> tuple[Decoder, Job]:
    """The decoder as tuning begins, and the job that binds it to the mixture and the folder `out`."""
    runtime.set_seed(recipe.seed)
    decoder = lora_recipe.load(model.path, recipe.loop.compute_dtype(), recipe.lora, recipe.seed)
    prefix = "" if recipe.mixture else "conversations-"
    context, mask = recipe.loop.context, recipe.loop.document_mask
    sets, held_out = (open_sets(shards, prefix, split) for split in ("train", "validation"))
    rows = PackedRows(sets, recipe.mixture, context, recipe.seed, mask, recipe.too_long)
    validation = held_out_rows(held_out, recipe.mixture, context, mask, recipe.too_long)
    name = "lora" if recipe.lora else "sft"
    objective = objectives.make(recipe.loop.compiles())
    job = Job(recipe.loop, recipe.optim, objective, rows, validation, out, name)
    job.tokenizer, job.save_weights = shards / "tokenizer", weights_saver(recipe, model)
    return decoder, job
