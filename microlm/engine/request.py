"""One request's state to its last token. Enters: ids and a Sampling; leaves: Deltas, a Completion."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from microlm.core.records import Completion, FinishReason, Sampling, TokenLogprob
from microlm.engine.grammar import Matcher
from microlm.engine.output import TextStream
from microlm.engine.sampling import Penalties, RandomStream


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
    """

    prompt: list[int]
    sampling: Sampling
    limit: int
    random: RandomStream | None = None
    matcher: Matcher | None = None
    text: TextStream | None = None
    output: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""
    penalties: Penalties | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    slot: int | None = None
    backlog: deque[Delta] = field(default_factory=deque)

    @property
    def position(self) -> int:
        """Where the last drawn token goes: how many tokens of this request the cache holds before it."""
        return len(self.prompt) + len(self.output) - 1

    def completion(self, text: str) -> Completion:
        """The finished answer."""
        assert self.finish_reason is not None
        return Completion(text, tuple(self.output), self.finish_reason, len(self.prompt), self.error)
