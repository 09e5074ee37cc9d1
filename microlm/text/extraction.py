"""Extraction as text: prompt, compact JSON answer `{head: {relation: tail}}`, its schema, its parser."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from microlm.core.records import Extraction, Triple

Found = frozenset[tuple[str, str, str]]


def prompt(text: str, allowed: Sequence[str], lang: str = "zh") -> str:
    """What the user asks: which relations, out of which text."""
    if lang == "en":
        return f"Extract as JSON: {', '.join(allowed)}\nText: {text}"
    return f"抽取为JSON：{'、'.join(allowed)}\n文本：{text}"


def answer(triples: Iterable[Triple], allowed: Sequence[str]) -> str:
    """The gold answer: heads in order of appearance, relations as asked; several tails form a list."""
    found: dict[str, dict[str, list[str]]] = {}
    for t in triples:
        if t.relation in allowed:
            tails = found.setdefault(t.head, {}).setdefault(t.relation, [])
            if t.tail not in tails:
                tails.append(t.tail)
    ordered = {
        head: {r: (tails[r][0] if len(tails[r]) == 1 else tails[r]) for r in allowed if r in tails}
        for head, tails in found.items()
    }
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


def parse(output: str) -> Found | None:
    """The triples of an answer; None when it is not JSON of the asked shape."""
    try:
        data = json.loads(output)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    triples: set[tuple[str, str, str]] = set()
    for head, relations in data.items():
        if not isinstance(relations, dict):
            return None
        for relation, value in relations.items():
            tails = value if isinstance(value, list) else [value]
            if not all(isinstance(t, str) for t in tails):
                return None
            triples.update((head, relation, t) for t in tails)
    return frozenset(triples)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many heads an answer may name, how many tails a relation may have, characters of each."""

    heads: int = 3
    tails: int = 4
    chars: int = 30

    def widened(self, records: Iterable[Extraction]) -> Bounds:
        """Bounds that the gold answer of every record fits too, as far as `LARGEST` allows."""
        heads, tails, chars = self.heads, self.tails, self.chars
        for record in records:
            gold = {(t.head, t.relation, t.tail) for t in record.relation if t.relation in record.allowed}
            pairs = Counter((head, relation) for head, relation, _ in gold)
            heads = max(heads, len({head for head, _ in pairs}))
            tails = max(tails, *pairs.values(), 0)
            chars = max(chars, *(len(text) for head, _, tail in gold for text in (head, tail)), 0)
        most = LARGEST
        return Bounds(min(heads, most.heads), min(tails, most.tails), min(chars, most.chars))


LARGEST = Bounds(heads=32, tails=32, chars=256)
"""However long the answers of somebody's data are: a schema without bounds lets a model run to its cap."""


def json_schema(allowed: Sequence[str], bounds: Bounds, copied: bool = False) -> dict[str, Any]:
    """The schema of an answer: bounded heads, only the asked relations in their order, bounded strings.

    `copied` writes the bound of the heads so that the copy grammar reads it; both admit the same answers.
    """
    text = {"type": "string", "minLength": 1, "maxLength": bounds.chars}
    tails = {"anyOf": [text, {"type": "array", "items": text, "minItems": 2, "maxItems": bounds.tails}]}
    relations = {"type": "object", "properties": dict.fromkeys(allowed, tails), "additionalProperties": False}
    if copied:
        heads = {
            "propertyNames": {"minLength": 1, "maxLength": bounds.chars},
            "additionalProperties": relations,
        }
    else:
        pattern = rf"^[\s\S]{{1,{bounds.chars}}}$"
        heads = {"patternProperties": {pattern: relations}, "additionalProperties": False}
    return {"type": "object", **heads, "maxProperties": bounds.heads}
