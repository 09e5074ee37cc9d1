"""`microlm run` and the commands that run one stage of a recipe.

Enters: a recipe file and `key=value` words. Leaves: artifacts; a line a stage on stderr, JSON on stdout.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from microlm.cli.pipeline import Planned
    from microlm.core.recipe import StageRecipe

RecipeFile = Annotated[
    Path,
    typer.Argument(
        help="a recipe file (.yaml), or the name of one that comes with MicroLM: quickstart",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="values that replace the recipe's", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show the resolved plan and run nothing")]
AllowMismatch = Annotated[
    bool,
    typer.Option("--allow-mismatch", help="go on from a checkpoint of other settings; the manifest tells it"),
]
TRAINING = ("pretrain", "sft", "dpo", "distil", "grpo")  # their --dry-run tells what the run takes

# command words → (stage type, what it does, example)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "data prepare": (
        "data",
        "Clean, deduplicate, split and audit the raw data.",
        "data.source=jsonl:my.jsonl",
    ),
    "data synth": (
        "synth",
        "Compose conversations from templates, or ask an endpoint for them in bulk.",
        "synth.endpoint.concurrency=8",
    ),
    "pretrain": ("pretrain", "Train a model from token shards.", "pretrain.loop.tokens=1e6"),
    "sft": ("sft", "Tune a model on conversations, wholly or by LoRA.", "seed=1"),
    "dpo": ("dpo", "Tune a model on pairs of a better and a worse answer.", "seed=1"),
    "distil": ("distil", "Train a model on a larger one's probabilities.", "seed=1"),
    "grpo": ("grpo", "Tune a model on rewards of its own answers.", "seed=1"),
    "eval predict": ("predict", "Let a model answer the held-out items.", "output=runs/mine"),
    "eval score": ("score", "Score predictions, with intervals and baselines.", "output=runs/mine"),
    "export merge": ("merge", "Merge a LoRA adapter into its model.", "output=runs/mine"),
    "export hf": ("export", "Write a Hugging Face directory, checked against transformers.", "seed=1"),
}
OWN_RECIPE = ("dpo", "distil", "grpo")  # the quickstart has no such stage
GROUPS = {
    "data": "Raw text to clean, split records.",
    "tokenizer": "Text to token ids.",
    "eval": "Answers to numbers.",
    "export": "Weights to other weights.",
}


class Result(NamedTuple):
    """What became of one stage."""

    name: str
    kind: str
    key: str
    digest: str
    skipped: bool
    seconds: float
    path: str


def register(app: typer.Typer) -> None:
    """Add `run` and the one-stage commands."""
    app.command("run", help=_RUN_HELP)(run)
    groups = {name: typer.Typer(no_args_is_help=True, help=text) for name, text in GROUPS.items()}
    for name, group in groups.items():
        app.add_typer(group, name=name)
    for words, (stage, help_text, example) in COMMANDS.items():
        group_name, _, word = words.rpartition(" ")
        owner = groups[group_name] if group_name else app
        _add_stage_command(
            owner, word, words, stage, f"{help_text}\n\n{_one_stage_help(words, stage, example)}"
        )


_RUN_HELP = """Run a pipeline, or one stage. What is finished already is skipped.

A word KEY=VALUE replaces a value of the recipe: STAGE.KEY=VALUE in a stage, and output=, seed=,
parallel.processes= for the whole pipeline. After an interruption the same command continues.

\b
Examples:
  microlm run recipes/quickstart.yaml
  microlm run recipes/quickstart.yaml output=runs/mine pretrain.loop.tokens=1e6
  microlm run quickstart --dry-run
"""


def run(
    recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False, dry_run: DryRun = False
) -> None:
    """Run every stage of a recipe."""
    _run(recipe, overrides or [], None, as_json=as_json, dry_run=dry_run)


def _one_stage_help(words: str, stage: str, example: str) -> str:
    return f"""RECIPE is a recipe of this one stage (stage: {stage}), or a pipeline: then every stage up
to its last '{stage}' stage is run. What is finished already is skipped.

\b
Example:
  microlm {words} recipes/{stage if stage in OWN_RECIPE else "quickstart"}.yaml {example}
"""


def _add_stage_command(app: typer.Typer, word: str, words: str, stage: str, help_text: str) -> None:
    def command(
        recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False, dry_run: DryRun = False
    ) -> None:
        _run(recipe, overrides or [], stage, as_json=as_json, dry_run=dry_run)

    def training(
        recipe: RecipeFile,
        overrides: Overrides = None,
        as_json: AsJson = False,
        dry_run: DryRun = False,
        allow_mismatch: AllowMismatch = False,
    ) -> None:
        plan = plan_of(recipe, overrides or [], stage)
        if allow_mismatch:
            plan = [_allowing(p) if p.stage == stage else p for p in plan]
        execute(plan, str(recipe), as_json=as_json, dry_run=dry_run, trained=stage)

    app.command(word, help=help_text)(training if stage in TRAINING else command)


def _allowing(planned: Planned) -> Planned:
    """A training stage that goes on from a checkpoint of other settings."""
    loop = planned.fields.get("loop") or {}
    if not isinstance(loop, dict):
        return planned  # its recipe says what is wrong
    return planned._replace(fields={**planned.fields, "loop": {**loop, "allow_mismatch": True}})


def _run(path: Path, words: Sequence[str], stage: str | None, *, as_json: bool, dry_run: bool) -> None:
    execute(plan_of(path, words, stage), str(path), as_json=as_json, dry_run=dry_run)


def execute(
    plan: Sequence[Planned], where: str, *, as_json: bool, dry_run: bool, trained: str | None = None
) -> None:
    """Check and run a plan, and say what became of it; with `dry_run` show it and run nothing.

    `trained` is the type of the training stage that the command is about.
    """
    from microlm.core import runtime

    recipes = build_all(plan, where)
    speaks = runtime.rank() == 0  # under torchrun all ranks come here
    if dry_run:
        if speaks and trained:
            from microlm.cli.training import commands

            commands.show(plan, recipes, trained, as_json=as_json)
        elif speaks:
            _show_plan(plan, recipes, as_json)
        return
    results: list[Result] = []
    started = time.monotonic()
    try:
        for result in run_all(plan, recipes):
            results.append(result)
            state = "skipped" if result.skipped else "done"
            count = f"[{len(results)}/{len(plan)}]"
            line = f"{count} {result.name:<12} {state:<7} {result.seconds:8.1f} s  {result.digest[:12]}"
            if speaks:
                typer.echo(line, err=True)
    except KeyboardInterrupt:
        name = plan[len(results)].name
        if speaks:
            typer.echo(f"\ninterrupted in stage '{name}'; run the same command again to continue", err=True)
        raise typer.Exit(130) from None
    if not speaks:
        return
    if as_json:
        typer.echo(json.dumps({"schema": 1, "stages": [r._asdict() for r in results]}, ensure_ascii=False))
    else:
        skipped = sum(r.skipped for r in results)
        seconds = time.monotonic() - started
        count = f"{len(results)} stage{'s' if len(results) > 1 else ''}"
        if results[-1].kind == "report":
            _show_summary(results[-1].path)
        typer.echo(f"{results[-1].path}: finished, {count} ({skipped} skipped), {seconds:.1f} s")
    if results[-1].kind == "report":
        _require_gates(results[-1].path)


def _show_summary(path: str) -> None:
    """The headline table of a report, with 95 % intervals, gates and baselines."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from microlm.core.manifest import open_artifact
    from microlm.eval.report import summary_rows

    table = Table(title="held-out scores (95 % interval)", box=SIMPLE, pad_edge=False)
    rows = summary_rows(open_artifact(path))
    has_before = any(row.get("before") is not None for row in rows)
    more = ["before"] if has_before else []
    for head in ("score", "value", "interval", "n", "gate", "regex", "nearest", *more):
        table.add_column(head, justify="left" if head == "score" else "right", no_wrap=True)
    for row in rows:
        gate = "" if row.get("gate") is None else f"{row['gate']:g} {'ok' if row['ok'] else 'MISSED'}"
        interval = "" if row["low"] is None else f"{row['low']:.3f}-{row['high']:.3f}"
        values = [_figure(row.get(k)) for k in ("regex", "nearest_template", *more)]
        table.add_row(row["name"], _figure(row["value"]), interval, str(row["n"]), gate, *values)
    Console(width=max(100, Console().width)).print(table)


def _require_gates(path: str) -> None:
    """A missed gate is a failed check: everything is there to look at, and the exit code says it."""
    from microlm.core.errors import CheckFailed
    from microlm.core.manifest import open_artifact
    from microlm.eval.report import summary_rows

    rows = [r for r in summary_rows(open_artifact(path)) if r.get("ok") is False]
    if rows:
        missed = ", ".join(
            f"{r['name']} {_figure(r['value']) or 'not measured'} < {r['gate']:g}" for r in rows
        )
        raise CheckFailed(f"{path}: {missed}; the report shows what was answered")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def plan_of(path: Path, words: Sequence[str], stage: str | None = None) -> list[Planned]:
    """The plan of a recipe file; with `stage`, up to its last stage of that type."""
    from microlm.cli import pipeline, stages
    from microlm.cli.recipes import find_recipe
    from microlm.core.errors import UserError
    from microlm.core.recipe import read_yaml

    path = find_recipe(path)
    data = read_yaml(path)
    if stage and "stages" not in data:
        data = {"stage": stage, **data}
        if data["stage"] != stage:
            raise UserError(
                f"{path}: is a recipe of stage '{data['stage']}', not '{stage}'; use 'microlm run {path}'"
            )
    plan = pipeline.resolve(data, words, stages.input_fields, str(path))
    return pipeline.until(plan, stage, str(path)) if stage else plan


def build_all(plan: Sequence[Planned], where: str) -> list[StageRecipe]:
    """Every recipe of a plan, checked before the first stage runs."""
    from microlm.cli import stages
    from microlm.core.recipe import build

    return [build(stages.load(p.stage).recipe, p.fields, f"{where}: stage {p.name}") for p in plan]


def run_all(plan: Sequence[Planned], recipes: Sequence[StageRecipe]) -> Iterator[Result]:
    """Run the stages in order; each result as it is there."""
    from microlm.cli import stages
    from microlm.core import manifest

    for planned, recipe in zip(plan, recipes, strict=True):
        started = time.monotonic()
        before = manifest.find(recipe.out)
        made = stages.load(planned.stage).run(recipe)
        skipped = before is not None and before.manifest == made.manifest
        seconds = round(time.monotonic() - started, 3)
        yield Result(planned.name, made.kind, made.key, made.digest, skipped, seconds, recipe.out)


def _show_plan(plan: Sequence[Planned], recipes: Sequence[StageRecipe], as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"name": p.name, "stage": p.stage, "recipe": r.model_dump(mode="json")}
        for p, r in zip(plan, recipes, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps({"schema": 1, "plan": rows}, ensure_ascii=False))
        return
    import yaml

    typer.echo(yaml.safe_dump(rows, allow_unicode=True, sort_keys=False), nl=False)
