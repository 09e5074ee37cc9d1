"""Stage `pretrain`: document shards → a stock model, from scratch or from a model that is there.

The only place that states an architecture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from microlm.core import runtime
from microlm.core.artifact import Workspace, stage
from microlm.core.errors import UserError
from microlm.core.manifest import CHECKPOINT, Artifact, folder_digest, hash_file
from microlm.core.recipe import Recipe, StageRecipe, artifact_input
from microlm.model import directory
from microlm.model.architecture import ArchitectureRecipe
from microlm.model.config import ModelConfig
from microlm.model.rope import RopeScaling
from microlm.model.transformer import Decoder, initialise
from microlm.text.chat.directory import read_sources, special_tokens
from microlm.text.shards import open_sets
from microlm.text.tokenizer import FILES, copy_files
from microlm.train import memory, objectives
from microlm.train.batches import PackedRows, held_out_rows
from microlm.train.checkpoint import publish_best
from microlm.train.job import Job, LoopRecipe, Sampler, fingerprint
from microlm.train.loop import train
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks, launch, processes, warn_idle
from microlm.train.reporter import SUMMARY, write_summary

BEST = "best"  # the weights of the lowest validation loss, where loop.keep_best asks for them
TOKENIZER = FILES[0]
SHAPE = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "tie_word_embeddings",
)  # fmt: skip


class ExtendRecipe(Recipe):
    """A longer context for a model that is trained on; positions in tokens."""

    max_positions: int = Field(ge=16, le=1 << 20, description="longest sequence from now on")
    scaling: Literal["none", "linear", "llama3"] = Field(
        default="llama3", description="how the rotary angles are slowed down"
    )
    factor: float | None = Field(
        default=None, ge=1, description="how much; none: max_positions over the trained positions"
    )
    trained_positions: int | None = Field(
        default=None, ge=16, description="length the model knows; none: the context of its last training"
    )
    rope_theta: float | None = Field(default=None, ge=1, le=1e9, description="a new base; none: as it was")

    def config(self, before: ModelConfig, trained: int) -> ModelConfig:
        """The configuration with the longer context; `trained` counts unless the recipe says otherwise."""
        known = self.trained_positions or trained
        factor = self.factor or max(1.0, self.max_positions / known)
        scaling = {
            "none": None,
            "linear": RopeScaling("linear", factor),
            "llama3": RopeScaling("llama3", factor, original_max_position_embeddings=known),
        }[self.scaling]
        return replace(
            before,
            max_position_embeddings=self.max_positions,
            rope_theta=self.rope_theta or before.rope_theta,
            rope_scaling=scaling,
        )


class PretrainRecipe(StageRecipe):
    """Train on documents: a model from scratch (`architecture`), or one that is there (`model`)."""

    shards: str = artifact_input(kinds=("shards",), description="shards artifact")
    model: str | None = artifact_input(
        None, kinds=("model",), description="model artifact to go on with; none: start from scratch"
    )
    architecture: ArchitectureRecipe | None = Field(
        default=None, description="the model's shape; none: that of `model`"
    )
    init: Literal["zero_outputs", "plain"] = Field(
        default="zero_outputs", description="blocks start as the identity; or all matrices normal(0, 0.02)"
    )
    extend: ExtendRecipe | None = Field(default=None, description="a longer context for `model`")
    loop: LoopRecipe = Field(default=LoopRecipe(), description="length, batch, precision")
    optim: OptimRecipe = Field(default=OptimRecipe(), description="rates and schedule")

    @model_validator(mode="after")
    def _one_start(self) -> PretrainRecipe:
        if self.architecture is None and self.model is None:
            raise ValueError(
                "states no model; give architecture (a preset, say: architecture.preset=26m) or model"
            )
        if self.extend and self.model is None:
            raise ValueError("extend is for a model that is there; set architecture.max_positions instead")
        return self


VERSION = 4


@stage("pretrain", "model", VERSION)
def run(recipe: PretrainRecipe, work: Workspace, sample: Sampler | None = None) -> None:
    """Initialise or load, train on every rank, save the HF directory; `sample` writes texts on the way."""
    shards, model = work.inputs["shards"], work.inputs.get("model")
    if model:
        require_same_tokenizer(model, shards)
    config = configuration(recipe, shards, model)
    memory.check(config, recipe)
    work.processes = processes(recipe.parallel)
    warn_idle("pretrain", recipe.parallel, recipe.loop.batch_rows, recipe.loop.micro_rows)
    start = model.path if model else None
    made_for = fingerprint(f"pretrain {VERSION}", recipe, work.inputs, shards.file(f"tokenizer/{TOKENIZER}"))
    prepared = (config, start, shards.path, work.path, made_for, sample)
    if launch(recipe.parallel, _rank, recipe, *prepared):
        finish(work, shards.path / "tokenizer")


def configuration(recipe: PretrainRecipe, shards: Artifact, model: Artifact | None) -> ModelConfig:
    """The architecture that is trained; one that contradicts the model to go on with is refused."""
    if model is None:
        assert recipe.architecture is not None
        return recipe.architecture.config(shards.json("index.json"))
    found = directory.read_config(model.path)
    if recipe.architecture:
        stated = recipe.architecture.config(shards.json("index.json"))
        for name in SHAPE:
            ours, theirs = getattr(stated, name), getattr(found, name)
            if ours != theirs:
                raise UserError(
                    f"architecture: {name} is {ours} here and {theirs} in {model.url}; "
                    "leave architecture out, it comes with the model"
                )
    if not recipe.extend:
        return found
    loop = model.manifest.get("recipe", {}).get("loop", {})
    return recipe.extend.config(found, trained_positions(found, loop))


def trained_positions(config: ModelConfig, loop: Mapping[str, Any]) -> int:
    """The length that a model knows without scaling: by its config, or the context of its last training."""
    scaling = config.rope_scaling
    if scaling is None:
        return int(loop.get("context", config.max_position_embeddings))
    return scaling.original_max_position_embeddings or round(config.max_position_embeddings / scaling.factor)


def require_same_tokenizer(model: Artifact, shards: Artifact) -> None:
    """The shards' ids mean something only to the tokenizer that made them."""
    if hash_file(model.file(TOKENIZER)) != hash_file(shards.file(f"tokenizer/{TOKENIZER}")):
        raise UserError(
            f"{shards.url}: was made with another tokenizer than that of {model.url}; "
            "tokenize the data with the tokenizer that the model was trained with"
        )


def require_same_chat(model: Artifact, shards: Artifact) -> None:
    """Conversations are learnt as the shards spell them, and asked as the model's own files do."""
    require_same_tokenizer(model, shards)
    places = (model.path, shards.path / "tokenizer")
    facts = {"chat template": read_sources, "special tokens": special_tokens}
    for what, read in facts.items():
        ours, theirs = map(read, places)
        if ours != theirs:
            odd = ", ".join(sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n)))
            raise UserError(
                f"{shards.url}: its conversations were written with another {what} ({odd}) than {model.url} "
                "has, which would be asked in a form that it never learnt; tokenize the data with "
                f"tokenizer={model.url}"
            )


def finish(work: Workspace, tokenizer: Path) -> None:
    """Put the tokenizer beside the weights, and what is to be told into the manifest."""
    copy_files(tokenizer, work.path)
    best = work.path / BEST
    if publish_best(work.resume, best):
        copy_files(tokenizer, best)
        head = json.loads((best / CHECKPOINT).read_bytes())
        told = {k: head[k] for k in ("step", "validation_loss")}
        work.metrics[BEST] = told | {"digest": folder_digest(best, best.iterdir())}
    work.metrics.update(json.loads((work.logs / SUMMARY).read_bytes()))


def _rank(
    ranks: Ranks,
    recipe: PretrainRecipe,
    config: ModelConfig,
    start: Path | None,
    shards: Path,
    out: Path,
    made_for: Mapping[str, Any],
    sample: Sampler | None,
) -> None:
    decoder, job = prepare(recipe, config, start, shards, out)
    job.fingerprint, job.sampler = made_for, sample
    at = train(ranks, decoder, job)
    if ranks.rank == 0:
        job.save_weights(decoder, out)
        write_summary(job, decoder, at)


def prepare(
    recipe: PretrainRecipe, config: ModelConfig, start: Path | None, shards: Path, out: Path
) -> tuple[Decoder, Job]:
    """The decoder as training begins, and the job that binds it to the documents and the folder `out`."""
    runtime.set_seed(recipe.seed)
    if start:
        decoder = directory.load(start, recipe.loop.compute_dtype(), config)
    else:
        decoder = Decoder(config, recipe.loop.compute_dtype())
        generator = torch.Generator().manual_seed(runtime.derive_seed(recipe.seed, "init"))
        initialise(decoder, generator, plain=recipe.init == "plain")
    context, mask = recipe.loop.context, recipe.loop.document_mask
    rows = PackedRows(open_sets(shards, "documents", "train"), {}, context, recipe.seed, mask)
    validation = held_out_rows(open_sets(shards, "documents", "validation"), {}, context, mask)
    objective = objectives.make(recipe.loop.compiles())
    job = Job(recipe.loop, recipe.optim, objective, rows, validation, out, "pretrain")
    job.tokenizer = shards / "tokenizer"
    return decoder, job
