"""Answers + gold → outcomes. Pure functions; a change that alters a number raises `SCORER_VERSION`.

Nothing is repaired before it is scored: a fenced, truncated or nested answer counts as it was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microlm.core.records import Extraction
from microlm.text import extraction

SCORER_VERSION = 5
SCHEMA = 2  # of scores.json and samples.json


@dataclass(frozen=True, slots=True)
class Counts:
    """Set sizes of one item: what was matched, predicted and wanted."""

    matched: int
    predicted: int
    gold: int

    @property
    def is_exact(self) -> bool:
        """Whether all that was wanted was predicted, and nothing else."""
        return self.matched == self.predicted == self.gold


@dataclass(frozen=True, slots=True)
class ExtractionOutcome:
    """One extraction answer against its gold. `unsupported`: predicted tails that are not in the text."""

    triples: Counts
    heads: Counts
    parsed: bool
    schema_valid: bool
    truncated: bool
    unsupported: int


def exact(output: str, answer: str) -> bool:
    """Whether an answer equals the gold, outer whitespace aside."""
    return output.strip() == answer.strip()


def gold_triples(record: Extraction) -> extraction.Found:
    """The triples that were asked for: relations outside `allowed` are not part of the task."""
    return frozenset((t.head, t.relation, t.tail) for t in record.relation if t.relation in record.allowed)


def count(predicted: Iterable[Any], gold: Iterable[Any]) -> Counts:
    """Sizes of two collections as sets (a duplicate counts once) and of their overlap."""
    left, right = set(predicted), set(gold)
    return Counts(len(left & right), len(left), len(right))


def score_extraction(
    record: Extraction, output: str, finish_reason: str, bounds: extraction.Bounds
) -> ExtractionOutcome:
    """Compare one raw answer with its record; an answer of another shape predicts nothing."""
    found = extraction.parse(output)
    gold = gold_triples(record)
    predicted = found or frozenset()
    return ExtractionOutcome(
        triples=count(predicted, gold),
        heads=count((head for head, _, _ in predicted), (head for head, _, _ in gold)),
        parsed=found is not None,
        schema_valid=found is not None
        and conforms(json.loads(output), extraction.json_schema(record.allowed, bounds)),
        truncated=finish_reason == "length",
        unsupported=sum(tail not in record.text for _, _, tail in predicted),
    )


def fits(record: Extraction, bounds: extraction.Bounds) -> bool:
    """Whether the gold answer can be given under the schema at all."""
    gold = json.loads(extraction.answer(record.relation, record.allowed))
    return conforms(gold, extraction.json_schema(record.allowed, bounds))


def stopped(finish_reason: str) -> bool:
    """Whether an answer ended at EOS, before its token cap."""
    return finish_reason == "stop"


def groups(named: Sequence[Sequence[str]]) -> list[str]:
    """One name for each item, equal for items that share a name, directly or through other items."""
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parents.setdefault(name, name)) != name:
            parents[name] = name = parents[above]
        return name

    for names in named:
        for other in names[1:]:
            parents[root(other)] = root(names[0])
    return [root(names[0]) for names in named]


def conforms(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a JSON value fits a schema of the few keywords that `text.extraction.json_schema` uses.

    Raises ValueError for a keyword it does not know: a check that skips a rule would be a false pass.
    """
    if unknown := _unknown(schema):
        raise ValueError(f"schema keyword {unknown[0]!r} is not checked by the scorer")
    if "anyOf" in schema and not any(conforms(value, s) for s in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kind = schema.get("type")
    if kind is not None and not isinstance(value, _TYPES[kind]):
        return False
    if isinstance(value, dict):
        return _object_conforms(value, schema)
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0) and len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, list):
        size = len(value)
        within = schema.get("minItems", 0) <= size <= schema.get("maxItems", size)
        return within and all(conforms(v, schema.get("items", {})) for v in value)
    return True


def _unknown(schema: Mapping[str, Any]) -> list[str]:
    return sorted(set(schema) - {*_KEYWORDS, "description", "title"})


_TYPES: Mapping[str, type] = {"object": dict, "array": list, "string": str}
_KEYWORDS = {
    *("type", "properties", "patternProperties", "additionalProperties", "required", "minProperties"),
    *("maxProperties", "minLength", "maxLength", "items", "minItems", "maxItems", "anyOf", "enum"),
}


def _object_conforms(value: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    size = len(value)
    if not schema.get("minProperties", 0) <= size <= schema.get("maxProperties", size):
        return False
    if not set(schema.get("required", ())) <= set(value):
        return False
    patterns = schema.get("patternProperties", {})
    for key, item in value.items():
        rules = [schema["properties"][key]] if key in schema.get("properties", {}) else []
        rules += [rule for pattern, rule in patterns.items() if _matches(pattern, key)]
        rules = rules or [schema.get("additionalProperties", True)]
        if not all(rule is True or (rule is not False and conforms(item, rule)) for rule in rules):
            return False
    return True


def _matches(pattern: str, text: str) -> bool:
    """As JSON Schema reads a pattern: its `$` is the end, and not also before a last line break."""
    return re.search(re.sub(r"\$$", r"\\Z", pattern), text) is not None
