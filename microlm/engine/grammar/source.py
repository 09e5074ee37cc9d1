"""A Constraint → the text of a grammar as `llguidance` reads it, checked and bounded."""

from __future__ import annotations

import json
import re
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from microlm.core.errors import UserError
from microlm.core.records import Constraint
from microlm.engine.grammar import limits
from microlm.engine.grammar.copied_schema import copied_schema
from microlm.engine.grammar.copying import Copies, no_copy

# No \uXXXX: it would let lone surrogates and NUL into answers. No free whitespace: a model may stay in it.
JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ",",
    "key_separator": ":",
    "json_allowed_escapes": 'nrbtf\\"',
    "coerce_one_of": False,
    "lenient": False,
}
_OPTIONS = '\n%llguidance {"no_forcing": true}'
"""An id is allowed wherever its text is; else it had to be the one that our tokenizer would choose."""
_WORDS = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/')
"""What may hold any character in a Lark grammar: strings, comments, patterns."""


def source_of(constraint: Constraint) -> str:
    """The grammar's text; a UserError says what is wrong with the constraint."""
    return _rules(constraint) + _OPTIONS


def _rules(constraint: Constraint) -> str:
    try:
        (constraint.value + (constraint.copy_from or "")).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{constraint.kind}: holds a lone surrogate, which is not text; take it out"
        ) from None
    kind, value = constraint.kind, constraint.value
    if constraint.copy_from is not None or kind == "copy":
        return _copied(constraint)
    if kind == "json_schema":
        return _schema(value)
    if kind == "json_object":
        return _schema('{"type":"object"}')
    if kind == "regex":
        return _regex(value)
    if kind == "choice":
        return _choice(value)
    return _grammar(value)


def _copied(constraint: Constraint) -> str:
    """A copy alone, a schema whose free strings are copies, or a grammar that says COPY where one is."""
    kind, text = constraint.kind, constraint.copy_from
    if text is None:
        raise UserError("copy: copy_from is missing; give the text that the answer is a part of")
    if kind in ("regex", "choice"):
        raise UserError(
            f"{kind}: copy_from goes with copy, json_schema, json_object and grammar; leave it out"
        )
    copies = Copies(text, words=constraint.copy_words, quoted=kind in ("json_schema", "json_object"))
    if kind in ("json_schema", "json_object"):
        schema = limits.read_schema(constraint.value) if kind == "json_schema" else {"type": "object"}
        return copied_schema(schema, copies, JSON_OPTIONS)
    name = copies.terminal(1, None)
    if name is None:
        raise no_copy(1, None, kind)
    start = "start: COPY" if kind == "copy" else _grammar(constraint.value)
    return "\n".join([start, f"COPY: {name}", *copies.lines])


def _schema(text: str) -> str:
    schema = limits.read_schema(text) | {"x-guidance": JSON_OPTIONS}
    try:
        return "start: %json " + json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError("json_schema: holds a number that is not JSON; numbers are finite") from None


def _regex(pattern: str) -> str:
    """The whole answer matches: so ^ at the beginning and $ at the end say nothing more."""
    limits.check_size("regex", pattern, limits.MAX_REGEX_CHARS)
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2 == 1:
        pattern = pattern[:-1]
    if not pattern:
        raise UserError("regex: the pattern is empty; write what the answer must match")
    return f"start: /{llguidance.regex_to_lark(pattern, '')}/"


def _choice(value: str) -> str:
    limits.check_size("choice", value, limits.MAX_CHARS)
    try:
        choices = json.loads(value)
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise UserError('choice: expected a JSON list of texts that are not empty, such as ["yes","no"]')
    if len(choices) > limits.MAX_CHOICES:
        raise UserError(
            f"choice: {len(choices)} choices, at most {limits.MAX_CHOICES} are allowed; shorten it"
        )
    # One terminal: rules would try the choices one by one, a terminal is an automaton.
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in choices)


def _grammar(text: str) -> str:
    """Lark, or GBNF turned into it; the control tokens of the vocabulary cannot be asked for."""
    limits.check_size("grammar", text, limits.MAX_CHARS)
    if "::=" in text:
        try:
            text = any_to_lark(text)
        except Exception as e:  # the converter raises IndexError, RecursionError and its own kind
            reason = str(e).strip().split("\n")[0]
            raise UserError(f"grammar: not GBNF ({reason}); write it as Lark, or correct it") from None
    if "<" in _WORDS.sub("", text):
        raise UserError(
            "grammar: <…> asks for a control token, which no answer may hold; write text in quotes"
        )
    return text
