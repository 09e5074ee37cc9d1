"""What a request's own tokens, and its biases, do to its scores; vLLM's formulas, in vLLM's order.

V: the vocabulary's size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from microlm.core.records import Sampling
from microlm.engine.sampling.draw import Scores

_LARGEST = np.finfo(np.float32).max


class Penalties:
    """The tokens of one request so far, and how they change its scores."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int) -> None:
        self._sampling, self._prompt, self._size = sampling, prompt, vocab_size
        self._begun = False  # requests may wait in thousands: arrays [V] come with the first draw

    def _begin(self) -> None:
        sampling = self._sampling
        self._repetition = np.float32(sampling.repetition_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        self._bias = np.zeros(self._size, np.float32)
        for token, bias in sampling.logit_bias:
            self._bias[token] += bias
        self._seen = np.zeros(self._size, np.bool_)
        self._seen[[i for i in self._prompt if i < self._size]] = True
        self._counts = np.zeros(self._size, np.float32)
        self._begun = True

    @classmethod
    def of(cls, sampling: Sampling, prompt: Sequence[int], vocab_size: int) -> Penalties | None:
        """The penalties of a request, None where nothing changes its scores."""
        if (
            sampling.repetition_penalty == 1
            and not (sampling.presence_penalty or sampling.frequency_penalty)
            and not sampling.logit_bias
        ):
            return None
        return cls(sampling, prompt, vocab_size)

    def add(self, token: int) -> None:
        """A token of the answer; scores were asked for before."""
        self._seen[token] = True
        self._counts[token] += 1

    def apply(self, scores: Scores) -> Scores:
        """Changed scores [V], a new array: bias, then repetition (prompt and answer), frequency, presence."""
        if not self._begun:
            self._begin()
        changed = scores + self._bias
        if self._repetition != 1:
            seen = np.flatnonzero(self._seen)
            old = changed[seen]
            changed[seen] = np.where(old > 0, old / self._repetition, old * self._repetition)
        if self._frequency or self._presence:
            changed -= self._frequency * self._counts + self._presence * (self._counts > 0)
        np.minimum(changed, _LARGEST, out=changed)  # a draw knows -inf, but no other way to leave the numbers
        return changed
