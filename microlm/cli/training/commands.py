"""`microlm plan` and `microlm train overfit`: what a run takes, whether it can learn, before it starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from microlm.cli.run import TRAINING, AsJson, Overrides, RecipeFile, build_all, plan_of, run_all

if TYPE_CHECKING:
    from microlm.cli.pipeline import Planned
    from microlm.core.recipe import StageRecipe
    from microlm.model.config import ModelConfig
    from microlm.train.plan import Plan

SCHEMA = 1
Measure = Annotated[
    bool, typer.Option("--measure", help="run a few real steps of each stage whose inputs are there")
]
StageName = Annotated[str, typer.Option("--stage", metavar="NAME", help="which training stage; the first")]
Steps = Annotated[int, typer.Option("--steps", min=10, help="optimizer steps")]
RowsOption = Annotated[int, typer.Option("--rows", min=1, help="rows of the batch")]


class Staged(NamedTuple):
    """A stage of a plan with its checked recipe."""

    planned: Planned
    recipe: StageRecipe


def register(app: typer.Typer) -> None:
    """Add `plan`, and the group `train` with `overfit`."""
    app.command("plan")(plan)
    group = typer.Typer(no_args_is_help=True, help="Checks of training.")
    app.add_typer(group, name="train")
    group.command("overfit")(overfit)


def plan(
    recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False, measure: Measure = False
) -> None:
    """What each training stage of a recipe takes: weights, memory, arithmetic, data, time.

    Nothing is made. Without --measure the time is that at the device's measured peak, which no run reaches.

    \b
    Examples:
      microlm plan recipes/quickstart.yaml
      microlm plan recipes/quickstart.yaml pretrain.architecture.preset=26m --measure
    """
    planned = plan_of(recipe, overrides or [])
    show(planned, build_all(planned, str(recipe)), None, as_json=as_json, measure=measure)


def show(
    planned: Sequence[Planned],
    recipes: Sequence[StageRecipe],
    only: str | None,
    *,
    as_json: bool,
    measure: bool = False,
) -> None:
    """Print the plans of the training stages; `only`: of the last one of that type."""
    from microlm.core.errors import UserError
    from microlm.train.overfit import tokens_per_s

    stages = [Staged(p, r) for p, r in zip(planned, recipes, strict=True)]
    wanted = [s for s in stages if s.planned.stage in TRAINING]
    wanted = wanted if only is None else [s for s in wanted if s.planned.stage == only][-1:]
    if not wanted:
        raise UserError(f"the recipe trains nothing; its stages: {', '.join(s.planned.name for s in stages)}")
    found: dict[str, Plan] = {}
    for staged in wanted:
        made = plan_stage(staged, stages)
        if measure and (why := _unmeasured(staged)):
            typer.echo(f"stage '{staged.planned.name}': not measured: {why}", err=True)
        elif measure:
            made = replace(made, tokens_per_s=tokens_per_s(_trainable(staged)))
        found[staged.planned.name] = made
    if as_json:
        rows = [{"name": s.planned.name, "stage": s.planned.stage, **found[s.planned.name].to_json()}
                for s in wanted]  # fmt: skip
        typer.echo(json.dumps({"schema": SCHEMA, "plans": rows}, ensure_ascii=False))
        return
    for name, made in found.items():
        typer.echo("\n".join([f"stage '{name}'", *(f"  {line}" for line in made.lines())]))


def plan_stage(staged: Staged, stages: Sequence[Staged]) -> Plan:
    """The plan of a training stage, from its inputs or (before they are made) from their recipes."""
    from microlm.core import manifest
    from microlm.train.plan import plan as make
    from microlm.train.tuning.grpo import reference_of

    recipe = _trainable(staged)
    if staged.planned.stage == "grpo":
        asked = {"prompts": _prompts(recipe)}
        config = _config(staged, stages)
        return make(recipe, config, asked, None, reference_of(recipe, config))
    index, shards = _index(recipe.shards, stages), manifest.find(recipe.shards)
    config, teacher = _config(staged, stages), _teacher(recipe, stages)
    return make(recipe, config, index, shards.path if shards else None, teacher)


def overfit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    stage: StageName = "",
    steps: Steps = 300,
    rows: RowsOption = 2,
    as_json: AsJson = False,
) -> None:
    """Learn one batch by heart: a loss below 0.05 says that model, data and rates are sound.

    The stages before are run first, or skipped if they are finished; nothing else is kept. The exit code is
    1 if the batch was not learnt.

    \b
    Examples:
      microlm train overfit recipes/quickstart.yaml
      microlm train overfit recipes/quickstart.yaml --stage sft --json
    """
    from microlm.train import overfit as trials

    planned = plan_of(recipe, overrides or [])
    recipes = build_all(planned, str(recipe))
    number = _chosen(planned, stage, str(recipe))
    _require_rows(Staged(planned[number], recipes[number]))
    for result in run_all(planned[:number], recipes[:number]):
        typer.echo(f"{result.name:<12} {'skipped' if result.skipped else 'done'}", err=True)
    found = trials.overfit(_trainable(Staged(planned[number], recipes[number])), steps, rows)
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "ok": found.ok, **asdict(found)}))
    elif found.ok:
        typer.echo(found.sentence())
    trials.require_overfit(found)


def _chosen(planned: Sequence[Planned], name: str, where: str) -> int:
    """Which stage of a plan is tried: the named one, or the first that trains."""
    from microlm.core.errors import UserError

    names = [p.name for p in planned if p.stage in TRAINING]
    if not names or (name and name not in names):
        asked = f"no training stage '{name}'" if name else "no stage that trains"
        raise UserError(f"{where}: holds {asked}; training stages: {', '.join(names) or 'none'}")
    return next(i for i, p in enumerate(planned) if p.name == (name or names[0]))


def _prompts(recipe: Any) -> int | None:
    """Conversations that can be asked, before any is too long; None when the data is not there yet."""
    from microlm.core import manifest
    from microlm.core.records import Conversation
    from microlm.text.read import read_records

    data = manifest.find(recipe.data)
    if data is None:
        return None
    chats = read_records(data.file("conversations/train.jsonl"), Conversation)
    return sum(not recipe.tasks or chat.task in recipe.tasks for chat in chats)


OWN_ROWS = "grpo learns from answers that it writes itself in every step"


def _unmeasured(staged: Staged) -> str | None:
    """Why no real steps can be timed now; None when they can."""
    from microlm.core import manifest

    if staged.planned.stage == "grpo":
        return OWN_ROWS
    places = [value for value in staged.recipe.inputs().values() if manifest.find(value) is None]
    return f"{places[0]} is not made yet" if places else None


def _require_rows(staged: Staged) -> None:
    """Refuse to try a stage whose rows the model itself writes."""
    from microlm.core.errors import UserError

    name = staged.planned.name
    if staged.planned.stage == "grpo":
        raise UserError(f"stage '{name}': {OWN_ROWS}; run it with few of them instead ({name}.steps=5)")


def _trainable(staged: Staged) -> Any:
    """The recipe as what it is: one of `train.plan`'s."""
    assert staged.planned.stage in TRAINING
    return staged.recipe


def _maker(place: str, stages: Sequence[Staged]) -> Staged | None:
    """The stage that makes what lies, or will lie, at a place: all of it, or its best checkpoint."""
    from microlm.cli.pipeline import BEST
    from microlm.core import storage

    return next((s for s in stages if place in (s.recipe.out, storage.join(s.recipe.out, BEST))), None)


def _index(shards: str, stages: Sequence[Staged]) -> Mapping[str, Any]:
    """The shards' index; before they are made what the tokenizer or its recipe says, and no sets."""
    from microlm.core import manifest
    from microlm.core.errors import UserError
    from microlm.text.tokenizer import Tokenizer

    if made := manifest.find(shards):
        return dict(made.json("index.json"))
    maker = _maker(shards, stages)
    tokenizer = getattr(maker.recipe, "tokenizer", "") if maker else ""
    if found := manifest.find(tokenizer) if tokenizer else None:
        size = found.manifest.get("metrics", {}).get("vocab_size") or Tokenizer.load(found.path).vocab_size
    else:
        trainer = _maker(tokenizer, stages)
        size = getattr(trainer.recipe, "vocab_size", None) if trainer else None
    if size is None:
        raise UserError(f"{shards}: is not made yet, so its vocabulary is unknown; make the shards first")
    return {"vocab_size": size, "eos_token_id": None, "pad_token_id": None, "sets": {}}


def _config(staged: Staged, stages: Sequence[Staged]) -> ModelConfig:
    """The architecture that a stage trains: of its recipe, its model, or the stage that will make that."""
    from microlm.core import manifest
    from microlm.core.errors import UserError
    from microlm.model.directory import read_config
    from microlm.train.pretrain import trained_positions

    recipe = _trainable(staged)
    if not recipe.model:
        return recipe.architecture.config(dict(_index(recipe.shards, stages)))
    if made := manifest.find(recipe.model):
        config, loop = read_config(made.path), made.manifest.get("recipe", {}).get("loop", {})
    elif (maker := _maker(recipe.model, stages)) and maker.planned.stage in TRAINING:
        config, loop = _config(maker, stages), {"context": _trainable(maker).loop.context}
    else:
        raise UserError(
            f"{recipe.model}: is not made yet, so its shape is unknown; run the stages before this one first"
        )
    extend = getattr(recipe, "extend", None)
    return extend.config(config, trained_positions(config, loop)) if extend else config


def _teacher(recipe: Any, stages: Sequence[Staged]) -> ModelConfig | None:
    """The architecture of the model that is learnt from, where a stage has one."""
    from microlm.core import manifest
    from microlm.core.errors import UserError
    from microlm.model.directory import read_config

    place = getattr(recipe, "teacher", None)
    if place is None:
        return None
    if made := manifest.find(place):
        return read_config(made.path)
    if (maker := _maker(place, stages)) and maker.planned.stage in TRAINING:
        return _config(maker, stages)
    raise UserError(f"{place}: is not made yet, so the teacher's shape is unknown; make it first")
