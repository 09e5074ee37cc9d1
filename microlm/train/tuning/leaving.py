"""What post-training stages leave: a model, or an adapter that names its base."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from microlm.core.manifest import Artifact, Kind
from microlm.model import directory, lora
from microlm.model.transformer import Decoder
from microlm.train.checkpoint import SaveWeights
from microlm.train.job import Job
from microlm.train.loop import train
from microlm.train.ranks import Ranks
from microlm.train.reporter import write_summary
from microlm.train.tuning.lora_recipe import LoraRecipe


class TuningRecipe(Protocol):
    """What the recipes of post-training stages have in common."""

    @property
    def lora(self) -> LoraRecipe | None: ...


def kind_of(recipe: TuningRecipe) -> Kind:
    """What the stage leaves."""
    return "adapter" if recipe.lora else "model"


def weights_saver(recipe: TuningRecipe, model: Artifact) -> SaveWeights:
    """How it is written."""
    if not recipe.lora:
        return directory.save
    return partial(lora.save_adapter, base_name=base_name(model), base_digest=model.digest)


def base_name(model: Artifact) -> str:
    """What PEFT may resolve the base by: an adopted model's name on the hub; else its folder's last word.

    No path: equal runs leave equal bytes, wherever they lie.
    """
    origin = model.manifest["metrics"].get("adopted", {}).get("origin", {})
    return str(origin.get("hub") or model.url.rstrip("/").rpartition("/")[2])


def train_and_leave(ranks: Ranks, decoder: Decoder, job: Job) -> None:
    """Train; rank 0 then writes the weights and what the manifest tells of them."""
    at = train(ranks, decoder, job)
    if ranks.rank == 0:
        job.save_weights(decoder, job.folder)
        write_summary(job, decoder, at)
