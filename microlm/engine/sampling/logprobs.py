"""Scores → log-probabilities, before temperature, penalties and grammar. Natural logarithms, in float64.

V: rows of the model's head, of which the tokenizer may know fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from microlm.core.records import TokenLogprob
from microlm.engine.sampling.draw import Scores

if TYPE_CHECKING:
    from microlm.engine.request import Request


def token_logprob(scores: Scores, token: int, count: int, vocab_size: int) -> TokenLogprob:
    """A token's log-probability by `scores` [V], and the `count` likeliest of the first `vocab_size` ids."""
    best = float(scores.max())
    total = best + math.log(np.exp(np.subtract(scores, best, dtype=np.float64)).sum())
    top = tuple((i, float(scores[i]) - total) for i in _likeliest(scores[:vocab_size], count))
    return TokenLogprob(token, float(scores[token]) - total, top)


def of_prompt(request: Request, following: Sequence[int], logits: Tensor, vocab_size: int) -> None:
    """Add a chunk's to `request.prompt_logprobs`: row j of `logits` [t,V] foretells `following[j]`.

    Chunks come in order, after the None of the prompt's first token, which nothing foretells.
    """
    count = request.sampling.prompt_logprobs or 0
    for scores, token in zip(logits.float().cpu().numpy(), following, strict=True):
        request.prompt_logprobs.append(token_logprob(scores, token, count, vocab_size))


def _likeliest(scores: Scores, count: int) -> list[int]:
    """The best ids, best first; of equal ones the lower id."""
    size = len(scores)
    if not count:
        return []
    least = np.partition(scores, size - count)[size - count] if count < size else scores.min()
    ids = np.flatnonzero(scores >= least)
    found: list[int] = ids[np.argsort(-scores[ids], kind="stable")][:count].tolist()
    return found
