"""What a caller asks → checked requests. Touches nothing that a step changes, so any thread may ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from microlm.core.errors import UserError
from microlm.core.records import Sampling
from microlm.engine.cache.pages import Chain
from microlm.engine.forward.adapters import Adapters
from microlm.engine.grammar import Grammars
from microlm.engine.output import TextStream
from microlm.engine.prompts import Prompt, check_window, encode_prompt
from microlm.engine.request import Request
from microlm.engine.sampling import Penalties, RandomStream, check_sampling
from microlm.engine.speculate import Lookup
from microlm.model.config import ModelConfig
from microlm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Asking:
    """Makes the requests of one engine; `window` and `draft` (0: none) are in tokens."""

    tokenizer: Tokenizer
    config: ModelConfig
    grammars: Grammars
    adapters: Adapters
    window: int
    draft: int
    draft_price: float

    def one(self, prompt: Prompt, sampling: Sampling, live: bool, adapter: str | None) -> Request:
        """One request, whatever `sampling.n`; `live`: each step's text is wanted."""
        return self._request(self._encode(prompt), sampling, live, adapter, 0)

    def many(self, prompt: Prompt, sampling: Sampling, live: bool, adapter: str | None) -> list[Request]:
        """`sampling.n` requests, answer i with seed + i."""
        ids = self._encode(prompt)
        check_sampling(sampling, self.tokenizer.vocab_size)
        return [self._request(ids, _with_seed(sampling, i), live, adapter, i) for i in range(sampling.n)]

    def all(
        self, prompts: Sequence[Prompt], samplings: Sequence[Sampling], adapter: str | None
    ) -> list[Request]:
        """The requests of many prompts, which nobody reads along with; an error names the prompt."""
        requests = []
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            try:
                requests += self.many(prompt, sampling, False, adapter)
            except UserError as e:
                raise UserError(f"prompt {i + 1} of {len(prompts)}: {e}") from None
        return requests

    def encode(self, texts: Sequence[Prompt]) -> list[list[int]]:
        """The ids of several texts; an error names the text."""
        ids = []
        for i, text in enumerate(texts):
            try:
                ids.append(self._encode(text))
            except UserError as e:
                raise UserError(f"text {i + 1} of {len(texts)}: {e}") from None
        return ids

    def _encode(self, prompt: Prompt) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, self.config.vocab_size)

    def _request(
        self, ids: list[int], sampling: Sampling, live: bool, adapter: str | None, index: int
    ) -> Request:
        check_sampling(sampling, self.tokenizer.vocab_size)
        check_window(len(ids), self.window)
        found = None if adapter is None else self.adapters.get(adapter)
        matcher = self.grammars.matcher(sampling.constraint) if sampling.constraint else None
        return Request(
            prompt=ids,
            sampling=sampling,
            limit=min(sampling.max_tokens, self.window - len(ids)),
            random=RandomStream(sampling.seed) if sampling.temperature > 0 else None,
            penalties=Penalties.of(sampling, ids, self.tokenizer.vocab_size),
            matcher=matcher,
            start=matcher.copy() if matcher is not None and sampling.stop else None,
            text=TextStream(self.tokenizer, sampling.stop) if live or sampling.stop else None,
            adapter=found,
            index=index,
            prompt_logprobs=[] if sampling.prompt_logprobs is None else [None],
            lookup=Lookup(ids, self.draft, self.draft_price) if self.draft else None,
            chain=Chain(found.key if found else ""),
        )


def _with_seed(sampling: Sampling, index: int) -> Sampling:
    """The sampling of one of n answers."""
    if sampling.seed is None or not index:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) % 2**63)
