"""One request's state to its last token. Enters: ids and a Sampling; leaves: Deltas, a Completion."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from microlm.core.records import Completion, FinishReason, Sampling, TokenLogprob
from microlm.engine.cache.pages import Chain
from microlm.engine.forward.adapters import Adapter
from microlm.engine.grammar import Matcher
from microlm.engine.output import TextStream
from microlm.engine.sampling import Penalties, RandomStream
from microlm.engine.speculate import Lookup


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a request; `finish_reason` is set on its last one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(eq=False, slots=True)
class Request:
    """A prompt on its way through the engine. `limit` is how many new tokens it may have, window included.

    `text` is None when nobody reads along and no stop string is looked for: decoded once, at the end.
    `start` is the matcher as it began, where a stop string may cut the answer; `index` says which of n
    answers it is; `backlog` is what a stream has not read yet, None where none reads. The last block is the
    scheduler's: `pages` hold keys and values of the first `computed` tokens, `table` has their numbers,
    `full` of them are known by their digest.
    """

    prompt: list[int]
    sampling: Sampling
    limit: int
    random: RandomStream | None = None
    penalties: Penalties | None = None
    matcher: Matcher | None = None
    start: Matcher | None = None
    text: TextStream | None = None
    adapter: Adapter | None = None
    index: int = 0
    output: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""
    backlog: deque[Delta] | None = None

    lookup: Lookup | None = None
    chain: Chain = field(default_factory=Chain)
    arrival: int = -1
    running: bool = False
    pages: list[int] = field(default_factory=list)
    table: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    computed: int = 0
    full: int = 0
    cached_tokens: int | None = None

    @property
    def length(self) -> int:
        """Tokens so far: prompt and answer."""
        return len(self.prompt) + len(self.output)

    def completion(self, text: str) -> Completion:
        """The finished answer."""
        assert self.finish_reason is not None
        asked = self.sampling
        return Completion(
            text=text,
            token_ids=tuple(self.output),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt),
            error=self.error,
            index=self.index,
            cached_tokens=self.cached_tokens or 0,
            logprobs=None if asked.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if asked.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )
