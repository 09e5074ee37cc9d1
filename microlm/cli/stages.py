"""The one table of stages: name → its module, recipe class and `run`. All are imported on use."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from microlm.core.errors import UserError

if TYPE_CHECKING:
    from microlm.core.artifact import Artifact
    from microlm.core.recipe import StageRecipe

STAGES: dict[str, str] = {
    "data": "microlm.text.prepare:PrepareRecipe:run",
    "synth": "microlm.text.synth.stage:SynthRecipe:run",
    "tokenizer": "microlm.text.vocab.stage:TokenizerRecipe:run",
    "tokenize": "microlm.text.shards:TokenizeRecipe:run",
    "pretrain": "microlm.train.pretrain:PretrainRecipe:run",
    "sft": "microlm.train.tuning.sft:SftRecipe:run",
    "dpo": "microlm.train.tuning.dpo:DpoRecipe:run",
    "distil": "microlm.train.tuning.distil:DistilRecipe:run",
    "grpo": "microlm.train.tuning.grpo:GrpoRecipe:run",
    "adopt": "microlm.export.adopt:AdoptRecipe:run",
    "merge": "microlm.export.merge:MergeRecipe:run",
    "predict": "microlm.eval.predict:PredictRecipe:run",
    "score": "microlm.eval.score:ScoreRecipe:run",
    "export": "microlm.export.hf:ExportRecipe:run",
    "verify": "microlm.eval.verify.stage:VerifyRecipe:run",
    "report": "microlm.eval.report:ReportRecipe:run",
}


# stage → what it is passed from rooms that it may not import: argument → function
TOOLS: dict[str, dict[str, str]] = {
    "pretrain": {"sample": "microlm.cli.training.samples:sample"},
    "sft": {"sample": "microlm.cli.training.samples:sample"},
    "dpo": {"sample": "microlm.cli.training.samples:sample"},
    "distil": {"sample": "microlm.cli.training.samples:sample"},
    "grpo": {
        "rollout": "microlm.cli.training.rollouts:open_rollout",
        "reward": "microlm.cli.training.rewards:find",
        "sample": "microlm.cli.training.samples:sample",
    },
}


class Stage(NamedTuple):
    """A stage that has been imported."""

    recipe: type[StageRecipe]
    run: Callable[[StageRecipe], Artifact]


def load(name: str) -> Stage:
    """Import a stage of the table; a missing package is an error that names it."""
    module_name, recipe_name, run_name = STAGES[name].split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] == "microlm":
            raise
        raise UserError(
            f"stage {name}: needs the package '{e.name}'; install it with pip install {e.name}"
        ) from e
    return Stage(getattr(module, recipe_name), functools.partial(getattr(module, run_name), **_tools(name)))


def _tools(name: str) -> dict[str, Callable[..., Any]]:
    found = {}
    for argument, place in TOOLS.get(name, {}).items():
        module, function = place.split(":")
        found[argument] = getattr(importlib.import_module(module), function)
    return found


def recipe_name(name: str) -> str:
    """The recipe class of a stage, by name, without importing it."""
    return STAGES[name].split(":")[1]


def input_fields(name: str) -> tuple[str, ...]:
    """The fields of a stage's recipe that name input artifacts."""
    return load(name).recipe.input_fields()
