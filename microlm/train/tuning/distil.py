"""Stage `distil`: a teacher's distributions → a student, from scratch or tuned, on any token sets.

The teacher has the student's tokenizer: what is compared are probabilities of the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from microlm.core import runtime
from microlm.core.artifact import Workspace, stage
from microlm.core.errors import UserError
from microlm.core.manifest import Artifact, hash_file
from microlm.core.recipe import StageRecipe, artifact_input
from microlm.model import directory
from microlm.model.architecture import ArchitectureRecipe
from microlm.model.config import ModelConfig
from microlm.model.transformer import Decoder, initialise
from microlm.text.shards import open_sets
from microlm.train import memory
from microlm.train.batches import PackedRows, TooLong, held_out_rows
from microlm.train.job import Job, LoopRecipe, Sampler, fingerprint
from microlm.train.objectives import distil
from microlm.train.optim import OptimRecipe
from microlm.train.pretrain import TOKENIZER, finish, require_same_tokenizer
from microlm.train.ranks import Ranks, launch, processes, warn_idle
from microlm.train.reporter import tell_lengths
from microlm.train.step import make_forward
from microlm.train.tuning import lora_recipe
from microlm.train.tuning.leaving import kind_of, train_and_leave, weights_saver
from microlm.train.tuning.lora_recipe import LoraRecipe


class DistilRecipe(StageRecipe):
    """Let a student learn what a teacher with the same tokenizer expects at every label."""

    teacher: str = artifact_input(kinds=("model",), description="model artifact to learn from")
    shards: str = artifact_input(kinds=("shards",), description="shards artifact, of the same tokenizer")
    model: str | None = artifact_input(
        None, kinds=("model",), description="model artifact that learns; none: one from scratch"
    )
    architecture: ArchitectureRecipe | None = Field(
        default=None, description="shape of a student from scratch; none: `model` learns"
    )
    mixture: dict[str, float] = Field(
        default={"documents": 1.0}, description="documents or task → share of the tokens"
    )
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="the teacher's share of the loss, the labels have the rest"
    )
    temperature: float = Field(
        default=1.0, gt=0, le=20, description="divides the logits of both before they are compared"
    )
    top_k: int = Field(default=0, ge=0, description="likeliest tokens of the teacher that count; 0: all")
    too_long: TooLong = Field(
        default="drop",
        description="conversations longer than loop.context: left out, cut on one side, or split",
    )
    lora: LoraRecipe | None = Field(
        default=None, description="train an adapter of this shape on `model`; none: all weights"
    )
    loop: LoopRecipe = Field(default=LoopRecipe(), description="length, batch, precision")
    optim: OptimRecipe = Field(default=OptimRecipe(), description="rates and schedule")

    @model_validator(mode="after")
    def _one_student(self) -> DistilRecipe:
        if (self.architecture is None) == (self.model is None):
            raise ValueError("takes one student: give architecture (from scratch) or model")
        if self.lora and self.model is None:
            raise ValueError("lora is for a model that is there; leave it out, or give model")
        return self


VERSION = 1


@stage("distil", kind_of, VERSION)
def run(recipe: DistilRecipe, work: Workspace, sample: Sampler | None = None) -> None:
    """Load teacher and student, train on every rank, save the student; `sample` writes texts on the way."""
    teacher, shards, model = work.inputs["teacher"], work.inputs["shards"], work.inputs.get("model")
    require_teacher(teacher, shards, recipe.loop.context)
    if model:
        require_same_tokenizer(model, shards)
    config, adapter = configuration(recipe, shards, model), recipe.lora.config() if recipe.lora else None
    memory.check(config, recipe, adapter, directory.read_config(teacher.path))
    work.processes = processes(recipe.parallel)
    warn_idle("distil", recipe.parallel, recipe.loop.batch_rows, recipe.loop.micro_rows)
    file = shards.file(f"tokenizer/{TOKENIZER}")
    made_for = fingerprint(f"distil {VERSION}", recipe, work.inputs, file)
    if launch(recipe.parallel, _rank, recipe, work.inputs, work.path, made_for, sample):
        finish(work, model.path if model else shards.path / "tokenizer")


def require_teacher(teacher: Artifact, shards: Artifact, context: int) -> None:
    """Probabilities of other tokens cannot be compared; and the teacher reads whole rows of `context`."""
    if hash_file(teacher.file(TOKENIZER)) != hash_file(shards.file(f"tokenizer/{TOKENIZER}")):
        raise UserError(
            f"{teacher.url}: the teacher has another tokenizer than {shards.url}, so their tokens cannot be "
            "compared; tokenize the data with the teacher's tokenizer, or learn from the text that it "
            "writes (recipes/distil_endpoint.yaml)"
        )
    positions = directory.read_config(teacher.path).max_position_embeddings
    if context > positions:
        raise UserError(
            f"{teacher.url}: the teacher reads {positions} tokens, loop.context is {context}; lower "
            f"loop.context to {positions}, or choose a teacher with more positions"
        )


def configuration(recipe: DistilRecipe, shards: Artifact, model: Artifact | None) -> ModelConfig:
    """The student's architecture."""
    if model:
        return directory.read_config(model.path)
    assert recipe.architecture is not None
    return recipe.architecture.config(shards.json("index.json"))


def _rank(
    ranks: Ranks,
    recipe: DistilRecipe,
    inputs: Mapping[str, Artifact],
    out: Path,
    made_for: Mapping[str, Any],
    sample: Sampler | None,
) -> None:
    decoder, job = prepare(recipe, inputs, out)
    job.fingerprint, job.sampler = made_for, sample
    if ranks.rank == 0:
        tell_lengths(job)
    train_and_leave(ranks, decoder, job)


def prepare(recipe: DistilRecipe, inputs: Mapping[str, Artifact], out: Path) -> tuple[Decoder, Job]:
    """The student as it begins, and the job that binds it to teacher, mixture and the folder `out`."""
    runtime.set_seed(recipe.seed)
    shards, model = inputs["shards"], inputs.get("model")
    if model:
        decoder = lora_recipe.load(model.path, recipe.loop.compute_dtype(), recipe.lora, recipe.seed)
    else:
        decoder = from_scratch(recipe, shards)
    context, mask = recipe.loop.context, recipe.loop.document_mask
    sets, held_out = (open_sets(shards.path, "", split) for split in ("train", "validation"))
    rows = PackedRows(sets, recipe.mixture, context, recipe.seed, mask, recipe.too_long)
    validation = held_out_rows(held_out, recipe.mixture, context, mask, recipe.too_long)
    mix = distil.Mix(recipe.alpha, recipe.temperature, recipe.top_k)
    objective = distil.make(load_teacher(recipe.loop, inputs["teacher"].path), mix, recipe.loop.compiles())
    job = Job(recipe.loop, recipe.optim, objective, rows, validation, out, "distil")
    job.tokenizer = shards.path / "tokenizer"
    if model:
        job.save_weights = weights_saver(recipe, model)
    return decoder, job


def from_scratch(recipe: DistilRecipe, shards: Artifact) -> Decoder:
    """A student as pretraining would begin it."""
    decoder = Decoder(configuration(recipe, shards, None), recipe.loop.compute_dtype())
    initialise(decoder, torch.Generator().manual_seed(runtime.derive_seed(recipe.seed, "init")))
    return decoder


def load_teacher(loop: LoopRecipe, path: Path) -> distil.Teacher:
    """A frozen model in the products' precision, where it will stay, with a forward pass of its own."""
    dtype = loop.compute_dtype()
    decoder = directory.load(path, dtype, weight_dtype=dtype).to(runtime.device()).requires_grad_(False)
    forward = make_forward(decoder, loop)
    return distil.Teacher(
        lambda batch: forward(batch.input_ids, batch.positions, forward.seen(batch)), decoder.lm_head.weight
    )
