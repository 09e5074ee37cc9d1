"""What post-training stages begin with and leave: the model with its adapter, and who saves which weights."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from microlm.core.manifest import Artifact, Kind
from microlm.model import directory, lora
from microlm.model.transformer import Decoder
from microlm.train.checkpoint import SaveWeights
from microlm.train.job import LoopRecipe
from microlm.train.tuning import lora_recipe
from microlm.train.tuning.lora_recipe import LoraRecipe


class TuningRecipe(Protocol):
    """What the recipes of post-training stages have in common."""

    @property
    def seed(self) -> int: ...
    @property
    def lora(self) -> LoraRecipe | None: ...
    @property
    def loop(self) -> LoopRecipe: ...


def load_model(recipe: TuningRecipe, model: Artifact) -> Decoder:
    """The decoder as tuning begins, with a fresh adapter if the recipe asks for one."""
    return lora_recipe.load(model.path, recipe.loop.compute_dtype(), recipe.lora, recipe.seed)


def weights_saver(recipe: TuningRecipe, model: Artifact) -> SaveWeights:
    """How the weights are written: as a model, or as an adapter that names its base."""
    if not recipe.lora:
        return directory.save
    base = model.url.rstrip("/").rpartition("/")[2]
    return partial(lora.save_adapter, base_name=base, base_digest=model.digest)


def kind_of(recipe: TuningRecipe) -> Kind:
    """What the stage leaves."""
    return "adapter" if recipe.lora else "model"
