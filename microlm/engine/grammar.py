"""Constrained decoding by `llguidance`: a JSON schema → masks over the vocabulary. Output is compact JSON."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from microlm.core.errors import UserError
from microlm.text.tokenizer import Tokenizer

Matcher = llguidance.LLMatcher
MAX_SCHEMA_CHARS = 65_536
MAX_SCHEMA_DEPTH = 32
_CACHED = 256  # compiled schemas kept
# No \uXXXX: it would let lone surrogates and NUL into answers. No free whitespace: a model may stay in it.
_OPTIONS: Any = {"whitespace_flexible": False, "json_allowed_escapes": 'nrbtf\\"'}


class Grammars:
    """Compiles schemas for one vocabulary, keeps them, and computes masks for many requests at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocabulary = _vocabulary(tokenizer)
        self._limits = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
        self._executor = llguidance.LLExecutor(1)
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()
        self._lock = threading.Lock()  # requests are prepared in many threads
        self._size = tokenizer.vocab_size
        self._words = (self._size + 31) // 32

    def matcher(self, schema: str) -> Matcher:
        """A fresh matcher of a JSON schema (as JSON text); a UserError says what is not supported."""
        with self._lock:
            if schema not in self._compiled:
                self._compiled[schema] = self._compile(schema)
                if len(self._compiled) > _CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(schema)
            return self._compiled[schema].deep_copy()

    def allowed(self, matchers: Sequence[Matcher]) -> Tensor:
        """Which ids may come next, [n,V] bool."""
        n = len(matchers)
        bits = np.zeros((n, self._words), dtype=np.int32)
        pairs = [(m, i) for i, m in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(pairs, bits.ctypes.data, self._words * 4, n)
        flags = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little", count=self._size)
        return torch.from_numpy(flags).view(torch.bool)

    def _compile(self, schema: str) -> Matcher:
        parsed = _parse(schema)
        if isinstance(parsed, bool):
            raise UserError(f"json_schema: expected a JSON object, found {schema}; {{}} allows any value")
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
        except ValueError as e:
            raise UserError(f"json_schema: {e}; see the JSON Schema 2020-12 documentation") from None
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=self._limits)
        probe = matcher.deep_copy()
        if not probe.is_error() and any(probe.compute_bitmask()) and not probe.is_error():
            return matcher  # a schema that nothing satisfies shows only at the first mask
        reason = probe.get_error().strip().split("\n")[0] or "nothing satisfies it"
        raise UserError(f"json_schema: cannot be used to constrain the output: {reason}; simplify the schema")


def _parse(schema: str) -> Any:
    """The schema as a value, bounded in size and depth before any recursive code sees it."""
    if len(schema) > MAX_SCHEMA_CHARS:
        raise UserError(
            f"json_schema: {len(schema)} characters, at most {MAX_SCHEMA_CHARS} are allowed; make it smaller"
        )
    depth = nesting(schema)
    if depth > MAX_SCHEMA_DEPTH:
        raise UserError(
            f"json_schema: nested {depth} deep, at most {MAX_SCHEMA_DEPTH} are allowed; flatten it"
        )
    try:
        value = json.loads(schema)
    except ValueError as e:
        raise UserError(f"json_schema: not valid JSON ({e}); check it with a JSON tool") from None
    if not isinstance(value, dict | bool):
        raise UserError(f"json_schema: expected a JSON object, found {type(value).__name__}")
    return value


def nesting(text: str) -> int:
    """The deepest nesting of brackets outside of strings in a JSON text."""
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


class _Words:
    """Our vocabulary in the form that llguidance asks for."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = [i for i, word in enumerate(tokenizer.token_bytes) if not word]
        self.tokens = [word or f"<|special {i}|>".encode() for i, word in enumerate(tokenizer.token_bytes)]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._encode(text)


def _vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Words(tokenizer)), eos_token=tokenizer.eos_id)
