"""How large a constraint may be: what is larger is refused in a sentence before any costly code sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import llguidance

from microlm.core.errors import UserError

NOTES = {
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "examples",
    "readOnly", "title", "writeOnly",
}  # fmt: skip
"""Keywords of a schema that say nothing about which values fit."""
MAX_CHARS = 65_536
"""Of a schema, a grammar, or all choices together."""
MAX_DEPTH = 32
"""Nested brackets of a schema."""
MAX_CHOICES = 4_096
MAX_REGEX_CHARS = 4_096
MAX_COPY_CHARS = 32_768
MAX_MERGED_PATTERNS = 10
"""In a schema with allOf, or with keywords beside $ref or anyOf: one more makes merging 4 times slower."""
MAX_PATTERN_PROPERTIES = 100
"""Of a schema; the time for telling them apart grows with the fourth power."""


def parser_limits() -> llguidance.LLParserLimits:
    """What one grammar may cost: lexer states are memory, fuel and items are time."""
    return llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def check_size(kind: str, text: str, most: int) -> None:
    """Refuse a text that is too long."""
    if len(text) > most:
        raise UserError(f"{kind}: {len(text)} characters, at most {most} are allowed; make it smaller")


def read_schema(text: str) -> dict[str, Any]:
    """A JSON schema as a value, bounded in size and depth before any recursive code sees it."""
    check_size("json_schema", text, MAX_CHARS)
    if (depth := nesting(text)) > MAX_DEPTH:
        raise UserError(f"json_schema: nested {depth} deep, at most {MAX_DEPTH} are allowed; flatten it")
    try:
        value = json.loads(text)
    except ValueError as e:
        raise UserError(f"json_schema: not valid JSON ({e}); check it with a JSON tool") from None
    if not isinstance(value, dict):
        found = text if isinstance(value, bool) else type(value).__name__
        raise UserError(f"json_schema: expected a JSON object, found {found}; {{}} allows any value")
    _check_patterns(value)
    return value


def _check_patterns(schema: dict[str, Any]) -> None:
    """Refuse more patterns than are compiled in about a second."""
    parts = [part for part in _parts(schema) if isinstance(part, dict)]
    patterns = sum(isinstance(part.get("pattern"), str) for part in parts)
    if patterns > MAX_MERGED_PATTERNS and any(_merges(part) for part in parts):
        raise UserError(
            f"json_schema: {patterns} patterns in a schema with allOf or with keywords beside $ref or anyOf, "
            f"at most {MAX_MERGED_PATTERNS} are allowed; write the parts out, or leave patterns out"
        )
    named = sum(len(p["patternProperties"]) for p in parts if isinstance(p.get("patternProperties"), dict))
    if named > MAX_PATTERN_PROPERTIES:
        raise UserError(
            f"json_schema: {named} patternProperties, at most {MAX_PATTERN_PROPERTIES} are allowed; "
            "join their patterns"
        )


def _parts(value: Any) -> Iterator[Any]:
    """A value and all that is in it."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        yield from _parts(part)


def _merges(part: dict[str, Any]) -> bool:
    if "allOf" in part:
        return True
    return bool({"$ref", "anyOf", "oneOf"} & set(part)) and len(set(part) - NOTES) > 1


def nesting(text: str) -> int:
    """The deepest nesting of brackets outside of double-quoted strings."""
    depth = deepest = 0
    quoted = escaped = False
    for c in text:
        if quoted:
            quoted = escaped or c != '"'
            escaped = c == "\\" and not escaped
        elif c == '"':
            quoted = True
        elif c in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "]}":
            depth -= 1
    return deepest
