"""Stage `pretrain`: document shards → a stock model; the only place that states an architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from microlm.core import runtime
from microlm.core.artifact import Workspace, stage
from microlm.core.recipe import Recipe, StageRecipe, artifact_input
from microlm.model import directory
from microlm.model.config import ModelConfig
from microlm.model.transformer import Decoder, initialise
from microlm.text.shards import open_sets
from microlm.text.tokenizer import copy_files
from microlm.train import objectives
from microlm.train.batches import PackedRows, held_out_rows
from microlm.train.job import Job, LoopRecipe
from microlm.train.loop import train
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks, launch, processes, warn_idle

SUMMARY = "summary.json"
MAX_WEIGHTS = 8_000_000_000  # each process holds them all, their gradients and two moments


class ArchitectureRecipe(Recipe):
    """The shape of the model; Qwen3's by default."""

    model_type: Literal["llama", "qwen2", "qwen3"] = Field(default="qwen3", description="stock architecture")
    hidden_size: int = Field(default=128, ge=8, le=16_384, description="width")
    layers: int = Field(default=4, ge=1, le=256, description="blocks")
    heads: int = Field(default=4, ge=1, le=256, description="query heads")
    kv_heads: int = Field(default=4, ge=1, le=256, description="key-value heads")
    head_dim: int = Field(default=32, ge=2, le=512, description="size of a head, even")
    intermediate_size: int = Field(default=352, ge=8, le=65_536, description="width of the SwiGLU")
    max_positions: int = Field(default=384, ge=16, le=1 << 20, description="longest sequence, in tokens")
    rope_theta: float = Field(default=10_000.0, ge=1, le=1e9, description="rotary base")
    tied: bool = Field(default=False, description="share embedding and head")

    @model_validator(mode="after")
    def _divisible(self) -> ArchitectureRecipe:
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError("heads must be a multiple of kv_heads, and head_dim even")
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        weights = self.layers * self.hidden_size * (attention + 3 * self.intermediate_size)
        if weights > MAX_WEIGHTS:
            raise ValueError(
                f"a shape of {weights / 1e9:,.1f} billion weights without the embedding, at most "
                f"{MAX_WEIGHTS / 1e9:g} billion are trained; lower hidden_size, intermediate_size or layers"
            )
        return self

    def config(self, index: dict[str, Any]) -> ModelConfig:
        """The stock configuration for a tokenizer's shards; the vocabulary is padded to a multiple of 64."""
        return ModelConfig(
            vocab_size=(index["vocab_size"] + 63) // 64 * 64,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_positions,
            rope_theta=self.rope_theta,
            model_type=self.model_type,
            tie_word_embeddings=self.tied,
            eos_token_id=index["eos_token_id"],
            pad_token_id=index["pad_token_id"],
        )


class PretrainRecipe(StageRecipe):
    """Train a model from scratch on documents."""

    shards: str = artifact_input(kinds=("shards",), description="shards artifact")
    architecture: ArchitectureRecipe = Field(default=ArchitectureRecipe(), description="the model's shape")
    loop: LoopRecipe = Field(default=LoopRecipe(), description="length, batch, precision")
    optim: OptimRecipe = Field(default=OptimRecipe(stable_share=1.0), description="rates and schedule")


@stage("pretrain", "model", version=2)
def run(recipe: PretrainRecipe, work: Workspace) -> None:
    """Initialise, train on every rank, save the HF directory."""
    shards = work.inputs["shards"].path
    work.processes = processes(recipe.parallel)
    warn_idle("pretrain", recipe.parallel, recipe.loop.batch_rows, recipe.loop.micro_rows)
    if launch(recipe.parallel, _rank, recipe, shards, work.path):
        copy_files(shards / "tokenizer", work.path)
        work.metrics.update(json.loads((work.logs / SUMMARY).read_bytes()))


def _rank(ranks: Ranks, recipe: PretrainRecipe, shards: Path, out: Path) -> None:
    runtime.set_seed(recipe.seed)
    index = json.loads((shards / "index.json").read_bytes())
    decoder = Decoder(recipe.architecture.config(index), recipe.loop.compute_dtype())
    initialise(decoder, torch.Generator().manual_seed(runtime.derive_seed(recipe.seed, "init")))
    rows = PackedRows(open_sets(shards, "documents", "train"), {}, recipe.loop.context, recipe.seed)
    validation = held_out_rows(open_sets(shards, "documents", "validation"), {}, recipe.loop.context)
    job = Job(recipe.loop, recipe.optim, objectives.next_token, rows, validation, out, "pretrain")
    at = train(ranks, decoder, job)
    if ranks.rank == 0:
        directory.save(decoder, out)
        write_summary(job.logs, decoder, at.history, at.tokens, rows.dropped)


def write_summary(
    logs: Path, decoder: Decoder, history: list[dict[str, float]], tokens: int, dropped: dict[str, int]
) -> None:
    """What the manifest reports of a training run: size, tokens, last losses, samples too long to use."""
    last = next((r for r in reversed(history) if "validation_loss" in r), {})
    summary = {
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "trained_parameters": sum(p.numel() for p in decoder.parameters() if p.requires_grad),
        "tokens": tokens,
        "loss": next((r["loss"] for r in reversed(history) if "loss" in r), None),
        "validation_loss": last.get("validation_loss"),
        "samples_longer_than_context": dropped,
        "peak_rss_bytes": runtime.peak_rss_bytes(),
    }
    (logs / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
