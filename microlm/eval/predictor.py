"""One way to ask a model, in two forms: the engine in this process, or an endpoint over HTTP.

Enters: items. Leaves: completions in their order, and bits of documents where the form can tell (else None).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

from microlm.core.client import ChatReply, Client
from microlm.core.errors import UserError
from microlm.core.payload import tool_fields
from microlm.core.records import Completion, Conversation, FinishReason, Message, Sampling
from microlm.core.runtime import Dtype
from microlm.engine import Engine
from microlm.engine.batch import Ask, finished

Told = Callable[[int], None]
"""Hears how many more items are done."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to ask: raw text or messages, how to draw the answer, and the tools that may be called."""

    id: str
    task: str
    prompt: str | tuple[Message, ...]
    sampling: Sampling
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DocumentBits:
    """What a document cost: `bits` of its tokens after the first, the EOS that ends it among them.

    `bytes` (UTF-8) leaves out the first token's, which nothing predicts: a document begins without context.
    """

    bits: float
    bytes: int
    tokens: int


class Predictor(Protocol):
    """Who answers items."""

    def predict(self, items: Sequence[Item], progress: Told | None = None) -> list[Completion]:
        """One completion for each item, in order; an item that cannot be asked has finish_reason `error`."""
        ...

    def bits(self, texts: Sequence[str], progress: Told | None = None) -> list[DocumentBits] | None:
        """Teacher-forced bits of whole documents; None when this form does not offer them."""
        ...


class EnginePredictor:
    """The engine in this process, all its slots filled."""

    def __init__(self, directory: str | Path, *, dtype: Dtype = "float32", batch_rows: int = 64) -> None:
        self.engine = Engine(directory, dtype=dtype, max_seqs=batch_rows)

    def predict(self, items: Sequence[Item], progress: Told | None = None) -> list[Completion]:
        """Answers; a prompt that leaves no room in the window is an error of that item only."""
        completions: dict[int, Completion] = {}
        for number, (first, *_) in finished(self.engine, (Ask(_prompt(i), i.sampling) for i in items)):
            completions[number] = first
            if progress:
                progress(1)
        return [completions[number] for number in range(len(items))]

    def bits(self, texts: Sequence[str], progress: Told | None = None) -> list[DocumentBits]:
        """Each token given what came before it in a window of at most `engine.max_seq_len` tokens."""
        tokenizer, results = self.engine.tokenizer, []
        encoded = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
        for first in range(0, len(texts), 64):
            group = encoded[first : first + 64]
            for nats, ids, text in zip(self._nats(group), group, texts[first : first + 64], strict=True):
                size = len(text.encode()) - len(tokenizer.token_bytes[ids[0]])
                results.append(DocumentBits(nats / math.log(2), size, len(ids) - 1))
            if progress:
                progress(len(group))
        return results

    def _nats(self, group: Sequence[Sequence[int]]) -> list[float]:
        """Minus the log-probability of each sequence, its first token given."""
        window = self.engine.max_seq_len
        pieces = [(i, ids[a:b], new) for i, ids in enumerate(group) for a, b, new in cut(len(ids), window)]
        known = self.engine.logprobs([ids for _, ids, _ in pieces])
        nats = [0.0] * len(group)
        for (i, _, new), values in zip(pieces, known, strict=True):
            nats[i] -= math.fsum(values[len(values) - new :])
        return nats


def _prompt(item: Item) -> str | Conversation:
    return item.prompt if isinstance(item.prompt, str) else Conversation(item.prompt, tools=item.tools)


def cut(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Windows `(start, end, new)` over `length` tokens: each but the first is new in exactly one of them.

    A later window begins half a window early, so that its new tokens have context.
    """
    start, scored = 0, 1
    while scored < length:
        end = min(start + window, length)
        yield start, end, end - scored
        scored, start = end, end - window // 2


class EndpointPredictor:
    """An OpenAI-compatible endpoint, asked by a few threads at once. It does not offer bits."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        requests: int = 16,
        timeout_s: float = 60.0,
    ) -> None:
        self.client = Client(url, api_key, timeout_s)
        self.model = model or self.client.default_model()
        self.requests = requests

    def predict(self, items: Sequence[Item], progress: Told | None = None) -> list[Completion]:
        """Answers in order; a refusal of the endpoint is an error of that item only."""

        def ask(item: Item) -> Completion:
            completion = self._ask(item)
            if progress:
                progress(1)
            return completion

        with ThreadPoolExecutor(self.requests) as pool:
            return list(pool.map(ask, items))

    def bits(self, texts: Sequence[str], progress: Told | None = None) -> None:
        """Not offered over HTTP."""
        return None

    def _ask(self, item: Item) -> Completion:
        try:
            if isinstance(item.prompt, str):
                reply = self.client.complete(item.prompt, item.sampling, self.model)
            else:
                tools = tool_fields(item.tools)
                reply = self.client.chat(item.prompt, item.sampling, self.model, **tools)
        except UserError as e:
            return Completion("", (), "error", 0, str(e))
        return Completion(reply.text, (), _reason(reply), reply.usage.prompt_tokens if reply.usage else 0)


def _reason(reply: ChatReply) -> FinishReason:
    return next((r for r in get_args(FinishReason) if r == reply.finish_reason), "error")
