"""Rewards that can be checked, by name: the evaluation room's functions as training's tool. 1 is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from microlm.core.errors import UserError

if TYPE_CHECKING:
    from microlm.core.records import Completion
    from microlm.train.batches.answers import Reward
    from microlm.train.batches.prompts import CanJudge, Prompt
    from microlm.train.tuning.grpo import GrpoRecipe


def find(name: str, recipe: GrpoRecipe) -> tuple[Reward, CanJudge]:
    """The reward of a recipe's word, and which gold answers it can judge by."""
    from microlm.train.batches.prompts import any_gold

    if name == "json":
        schema = _schema(recipe.json_schema) if recipe.json_schema else None
        return partial(is_json, schema=schema), any_gold
    return REWARDS[name], GOLDS.get(name, any_gold)


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
    from microlm.text.read import Fault
    from microlm.text.synth.check import check_json

    try:
        return float(isinstance(check_json(answer.text, schema or {}), dict))
    except Fault:
        return 0.0


def arithmetic(prompt: Prompt, answer: Completion) -> float:
    """1 when the last number that is said, after the thinking, equals the last one of the gold answer."""
    from microlm.text.sources.arithmetic import answer_of

    said, gold = answer_of(answer.text), answer_of(prompt.gold)
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


def is_extraction(gold: str) -> bool:
    """Whether a gold answer holds triples."""
    from microlm.text.extraction import parse

    return parse(gold) is not None


def has_number(gold: str) -> bool:
    """Whether a gold answer says a number."""
    from microlm.text.sources.arithmetic import answer_of

    return answer_of(gold) is not None


GOLDS: dict[str, CanJudge] = {"extraction": is_extraction, "arithmetic": has_number, "length": bool}


def _schema(place: str) -> dict[str, Any]:
    """A JSON schema out of a file."""
    from pathlib import Path

    from microlm.text.synth.check import check_schema

    try:
        schema = json.loads(Path(place).read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"json_schema: {place}: not JSON ({type(e).__name__}); give a schema") from None
    if not isinstance(schema, dict):
        raise UserError(f"json_schema: {place}: holds no JSON object; give a schema")
    try:
        check_schema(schema)
    except ValueError as e:
        raise UserError(f"json_schema: {place}: {e}") from None
    return schema
