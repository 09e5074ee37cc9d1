"""How large a constraint may be: what is larger is refused in a sentence before any costly code sees it."""

from __future__ import annotations

import json
from typing import Any

import llguidance

from microlm.core.errors import UserError

MAX_CHARS = 65_536
"""Of a schema, a grammar, or all choices together."""
MAX_DEPTH = 32
"""Nested brackets of a schema or grammar."""
MAX_CHOICES = 4_096
MAX_REGEX_CHARS = 4_096
MAX_COPY_CHARS = 32_768


def parser_limits() -> llguidance.LLParserLimits:
    """What one grammar may cost: lexer states are memory, fuel and items are time."""
    return llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def check_size(kind: str, text: str, most: int) -> None:
    """Refuse a text that is too long."""
    if len(text) > most:
        raise UserError(f"{kind}: {len(text)} characters, at most {most} are allowed; make it smaller")


def check_depth(kind: str, text: str) -> None:
    """Refuse brackets that are nested too deep."""
    depth = nesting(text)
    if depth > MAX_DEPTH:
        raise UserError(f"{kind}: nested {depth} deep, at most {MAX_DEPTH} are allowed; flatten it")


def read_schema(text: str) -> dict[str, Any]:
    """A JSON schema as a value, bounded in size and depth before any recursive code sees it."""
    check_size("json_schema", text, MAX_CHARS)
    check_depth("json_schema", text)
    try:
        value = json.loads(text)
    except ValueError as e:
        raise UserError(f"json_schema: not valid JSON ({e}); check it with a JSON tool") from None
    if not isinstance(value, dict):
        found = text if isinstance(value, bool) else type(value).__name__
        raise UserError(f"json_schema: expected a JSON object, found {found}; {{}} allows any value")
    return value


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
        elif c in "[{(":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "]})":
            depth -= 1
    return deepest
