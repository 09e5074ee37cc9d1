"""A recipe file's content and `key=value` words → the list of stages to run. Pure: reads and runs nothing.

A pipeline has `stages:`; a recipe with `stage:` at its top is one stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from microlm.cli.stages import STAGES, recipe_name
from microlm.core import storage
from microlm.core.errors import UserError
from microlm.core.recipe import apply_overrides, nearest, parse_override

TOP = ("name", "output", "seed", "parallel", "stages")
BEST = "best"  # in a training stage's directory, where its loop.keep_best asks for it
INHERITED = ("seed", "parallel")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

InputFields = Callable[[str], Collection[str]]


class Planned(NamedTuple):
    """One stage of a plan: its name (its directory), its type, its recipe class, and that recipe's fields."""

    name: str
    stage: str
    recipe: str
    fields: dict[str, Any]


def resolve(
    data: Mapping[str, Any], words: Sequence[str], input_fields: InputFields, where: str = "recipe"
) -> list[Planned]:
    """The plan of a recipe. `input_fields(stage)` names the fields that may hold an earlier stage's name."""
    if "stages" in data:
        return _pipeline(data, words, input_fields, where)
    if "stage" in data:
        return [_single(data, words, where)]
    raise UserError(
        f"{where}: has neither 'stages:' (a pipeline) nor 'stage:' (one stage); {_known_stages()}"
    )


def until(plan: Sequence[Planned], stage: str, where: str) -> list[Planned]:
    """The plan up to and including its last stage of the given type."""
    last = max((i for i, p in enumerate(plan) if p.stage == stage), default=None)
    if last is None:
        found = ", ".join(dict.fromkeys(p.stage for p in plan))
        raise UserError(f"{where}: holds no stage of type '{stage}', only {found}; use 'microlm run'")
    return list(plan[: last + 1])


def _single(data: Mapping[str, Any], words: Sequence[str], where: str) -> Planned:
    stage = _stage_type(data, where)
    # `output=` and `pretrain.loop.tokens=` mean here what they mean for a pipeline
    heads = {"output": "out", stage: ""} if stage not in data else {"output": "out"}
    fields = apply_overrides(data, [_rename_head(word, heads) for word in words])
    fields.pop("stage")
    name = str(fields.pop("name", stage))
    if "output" in fields:
        fields["out"] = fields.pop("output")
    if "out" not in fields:
        raise UserError(f"{where}: key 'out' is missing; add it, or give output=DIR on the command line")
    return Planned(name, stage, recipe_name(stage), fields)


def _pipeline(
    data: Mapping[str, Any], words: Sequence[str], input_fields: InputFields, where: str
) -> list[Planned]:
    entries = _entries(data, where)
    top, changes = _sort_overrides(words, list(entries), where)
    head = apply_overrides({k: v for k, v in data.items() if k != "stages"}, top)
    output = head.get("output") or f"runs/{head.get('name', 'run')}"
    if not isinstance(output, str):
        raise UserError(f"{where}: output: expected a directory, found {output!r}")
    places: dict[str, str] = {}
    plan = []
    for name, entry in entries.items():
        fields = apply_overrides(entry, changes[name])
        stage = fields.pop("stage")
        fields.pop("name", None)
        _inherit(fields, head)
        fields.setdefault("out", storage.join(output, name))
        for key in input_fields(stage):
            if key in fields:
                fields[key] = _place(fields[key], places, list(entries), f"{where}: {name}.{key}")
        places[name] = str(fields["out"])
        if isinstance(loop := fields.get("loop"), Mapping) and loop.get("keep_best"):
            places[f"{name}/{BEST}"] = storage.join(places[name], BEST)
        plan.append(Planned(name, stage, recipe_name(stage), fields))
    return plan


def _entries(data: Mapping[str, Any], where: str) -> dict[str, Mapping[str, Any]]:
    """Stage name → its entry, in order; every mistake of form is an error that says which entry."""
    for key in data:
        if key not in TOP:
            raise UserError(f"{where}: unknown key '{key}' of a pipeline; {nearest(str(key), TOP)}")
    stages = data["stages"]
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{where}: stages: expected a list of stages, each '- stage: TYPE' with its fields")
    entries: dict[str, Mapping[str, Any]] = {}
    for i, entry in enumerate(stages, 1):
        place = f"{where}: stages, entry {i}"
        if not isinstance(entry, Mapping):
            raise UserError(f"{place}: expected '- stage: TYPE' with its fields, found {entry!r}")
        stage = _stage_type(entry, place)
        name = entry.get("name", stage)
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in TOP:
            raise UserError(
                f"{place}: name {name!r} cannot be a stage's name; "
                f"use letters, digits, '-' and '_', and none of {', '.join(TOP)}"
            )
        if name in entries:
            raise UserError(f"{place}: a second stage named '{name}'; give it another 'name:'")
        entries[name] = entry
    return entries


def _stage_type(entry: Mapping[str, Any], where: str) -> str:
    stage = entry.get("stage")
    if stage is None:
        raise UserError(f"{where}: key 'stage' is missing; {_known_stages()}")
    if not isinstance(stage, str) or stage not in STAGES:
        raise UserError(f"{where}: no stage type '{stage}'; {nearest(str(stage), STAGES)}")
    return str(stage)


def _sort_overrides(
    words: Sequence[str], names: list[str], where: str
) -> tuple[list[str], dict[str, list[str]]]:
    """The words for the top level, and those for each stage with its name taken off."""
    top: list[str] = []
    changes: dict[str, list[str]] = {name: [] for name in names}
    for word in words:
        path, _ = parse_override(word)
        head = path[0]
        if head in changes:
            if len(path) == 1:
                raise UserError(f"override '{word}': '{head}' is a stage; write {head}.KEY=value")
            if path[1] in ("stage", "name"):
                raise UserError(
                    f"override '{word}': a stage's type and name stand in the recipe only; edit {where}"
                )
            changes[head].append(word.split(".", 1)[1])
        elif head in TOP and head != "stages":
            top.append(word)
        else:
            known = [*names, *(k for k in TOP if k != "stages")]
            raise UserError(
                f"override '{word}': '{head}' is neither a stage nor a top-level key; {nearest(head, known)}"
            )
    return top, changes


def _inherit(fields: dict[str, Any], head: Mapping[str, Any]) -> None:
    """Seed and parallel of the pipeline, where the stage does not set them (parallel key by key)."""
    for key in INHERITED:
        if key not in head:
            continue
        if isinstance(head[key], Mapping) and isinstance(fields.get(key), Mapping):
            fields[key] = {**head[key], **fields[key]}
        else:
            fields.setdefault(key, head[key])


def _place(value: Any, places: Mapping[str, str], names: list[str], where: str) -> Any:
    """The directory that an input field means: an earlier stage's, or the path that is written there."""
    if not isinstance(value, str) or value in places:
        return places.get(value, value) if isinstance(value, str) else value
    head, _, kept = value.partition("/")
    if head in names and head not in places:
        raise UserError(f"{where}: stage '{head}' does not run before this one; move it up in the list")
    if head in places and kept == BEST:
        raise UserError(f"{where}: stage '{head}' keeps no {BEST}; set {head}.loop.keep_best=true")
    if head in places:
        raise UserError(f"{where}: stage '{head}' leaves no '{kept}' to name (a directory is ./{value})")
    if value and "/" not in value and not value.startswith((".", storage.BUILTIN)):
        hint = nearest(value, places) if places else "no stage runs before this one"
        raise UserError(f"{where}: '{value}' is no earlier stage; {hint} (a directory is written ./{value})")
    return value


def _rename_head(word: str, heads: Mapping[str, str]) -> str:
    """The word with its first part replaced; replaced by nothing, the part and its dot go."""
    path, _ = parse_override(word)
    if path[0] not in heads:
        return word
    key, _, value = word.partition("=")
    rest = [heads[path[0]], *key.split(".")[1:]]
    renamed = ".".join(part for part in rest if part)
    return f"{renamed}={value}" if renamed else word


def _known_stages() -> str:
    return f"stage types: {', '.join(STAGES)}"
