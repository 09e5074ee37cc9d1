"""Rewards that can be checked, by name: the evaluation room's functions as training's tool. 1 is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

from microlm.core.errors import UserError

if TYPE_CHECKING:
    from microlm.core.records import Completion
    from microlm.train.batches.answers import Reward
    from microlm.train.batches.prompts import Prompt
    from microlm.train.tuning.grpo import GrpoRecipe

_NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?")


def find(name: str, recipe: GrpoRecipe) -> Reward:
    """The reward of a recipe's word."""
    if name == "json":
        schema = _schema(recipe.json_schema) if recipe.json_schema else None
        return partial(is_json, schema=schema)
    return REWARDS[name]


def extraction(prompt: Prompt, answer: Completion) -> float:
    """Strict triple F1 against the gold answer; what is no extraction is worth nothing."""
    from microlm.eval.scoring import count
    from microlm.text.extraction import parse

    found, gold = parse(answer.text), parse(prompt.gold)
    if found is None or gold is None:
        return 0.0
    counts = count(found, gold)
    said = counts.predicted + counts.gold
    return 2 * counts.matched / said if said else 1.0


def is_json(prompt: Prompt, answer: Completion, schema: Mapping[str, Any] | None) -> float:
    """1 for one valid JSON object, of the schema where there is one."""
    from microlm.eval.scoring import conforms

    try:
        value = json.loads(answer.text)
    except (ValueError, RecursionError):
        return 0.0
    return float(isinstance(value, dict) and (schema is None or conforms(value, schema)))


def arithmetic(prompt: Prompt, answer: Completion) -> float:
    """1 when the last number that is said equals the last one of the gold answer."""
    said, gold = last_number(answer.text), last_number(prompt.gold)
    return float(gold is not None and said == gold)


def ended(prompt: Prompt, answer: Completion) -> float:
    """1 for an answer that ended by itself."""
    return float(answer.finish_reason == "stop")


def length(prompt: Prompt, answer: Completion) -> float:
    """1 for an answer no longer than the gold one, less the longer it is."""
    return min(1.0, max(1, len(prompt.gold)) / max(1, len(answer.text)))


REWARDS: dict[str, Callable[[Prompt, Completion], float]] = {
    "extraction": extraction,
    "arithmetic": arithmetic,
    "ended": ended,
    "length": length,
}


def last_number(text: str) -> Decimal | None:
    """The number that a text says last; commas between digits do not count."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


def _schema(place: str) -> dict[str, Any]:
    """A schema of the keywords that the scorer checks."""
    from pathlib import Path

    from microlm.eval.scoring import unchecked

    try:
        schema = json.loads(Path(place).read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"json_schema: {place}: not JSON ({type(e).__name__}); give a schema") from None
    if not isinstance(schema, dict):
        raise UserError(f"json_schema: {place}: holds no JSON object; give a schema")
    if words := unchecked(schema):
        raise UserError(f"json_schema: {place}: the keyword {words[0]!r} is not checked; leave it out")
    return schema
