"""A `Sampling` as anyone may write it → the same, or one sentence that names the field."""

from __future__ import annotations

import math

from microlm.core.errors import UserError
from microlm.core.records import Sampling

_WHOLE = ("max_tokens", "top_k", "n", "seed", "logprobs", "prompt_logprobs")
MAX_ANSWERS = 1024
MAX_LOGPROBS = 100
MAX_BIAS = 100.0
LEAST_REPETITION, MOST_REPETITION = 0.01, 100.0  # beyond them scores leave float32


def check_sampling(s: Sampling, vocab_size: int) -> None:
    """Refuse settings that have no meaning, by name; `vocab_size` bounds the ids of `logit_bias`."""
    for name in _WHOLE:
        if (value := getattr(s, name)) is not None and not isinstance(value, int):
            raise UserError(f"{name}: {value!r} is not a whole number; give one")
    if isinstance(s.stop, str):
        raise UserError(f"stop: {s.stop!r} is one text, not a list of texts; put it into brackets")
    if not (math.isfinite(s.temperature) and s.temperature >= 0):
        raise UserError(f"temperature: {s.temperature} is not a number >= 0; 0 is greedy, 0.7 is usual")
    if not 0 < s.top_p <= 1:
        raise UserError(f"top_p: {s.top_p} is not in (0, 1]; 1 keeps every token")
    if s.top_k < 0:
        raise UserError(f"top_k: {s.top_k} is negative; 0 keeps every token")
    if not 0 <= s.min_p <= 1:
        raise UserError(f"min_p: {s.min_p} is not in [0, 1]; 0 keeps every token")
    if s.max_tokens < 1:
        raise UserError(f"max_tokens: {s.max_tokens} is below 1; ask for at least one token")
    if s.seed is not None and not 0 <= s.seed < 2**63:
        raise UserError(f"seed: {s.seed} is not between 0 and 2^63 - 1; choose another")
    if any(not text for text in s.stop):
        raise UserError("stop: an empty string stops everything; leave it out")
    if not 1 <= s.n <= MAX_ANSWERS:
        raise UserError(f"n: {s.n} is not between 1 and {MAX_ANSWERS}; ask for fewer answers at once")
    for name, count in (("logprobs", s.logprobs), ("prompt_logprobs", s.prompt_logprobs)):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise UserError(f"{name}: {count} is not between 0 and {MAX_LOGPROBS}; 0 gives the token's own")
    _check_changes(s, vocab_size)


def _check_changes(s: Sampling, vocab_size: int) -> None:
    """What changes scores: penalties and biases."""
    if not LEAST_REPETITION <= s.repetition_penalty <= MOST_REPETITION:
        raise UserError(
            f"repetition_penalty: {s.repetition_penalty} is not between {LEAST_REPETITION} and "
            f"{MOST_REPETITION:g}; 1 changes nothing"
        )
    for name, value in (("presence", s.presence_penalty), ("frequency", s.frequency_penalty)):
        if not -2 <= value <= 2:
            raise UserError(f"{name}_penalty: {value} is not between -2 and 2; 0 changes nothing")
    for token, bias in s.logit_bias:
        if not 0 <= token < vocab_size:
            raise UserError(f"logit_bias: no token has the id {token}; ids go from 0 to {vocab_size - 1}")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise UserError(f"logit_bias: {bias} of token {token} is not between -100 and 100")
