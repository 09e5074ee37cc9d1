"""How a check asks. Enters: the target; leave: replies, or `Failed` and `NotOffered` as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from microlm.core.client import ChatReply, EndpointError
from microlm.core.records import Message, Sampling
from microlm.eval.verify.verdict import Failed, NotOffered, Target

PROMPTS = ("Hello, who are you?", "Write a long story about the sea.", "李白是谁？", "1, 2, 3, 4, 5,")
TOKENS = 32
REFUSED = (400, 422, 501)
"""How an endpoint says that it does not have a field of the request."""


def expect(condition: bool, sentence: str) -> None:
    """Raise `Failed` with the sentence when the condition does not hold."""
    if not condition:
        raise Failed(sentence)


@contextmanager
def offered(what: str, statuses: tuple[int, ...] = REFUSED) -> Iterator[None]:
    """A refusal with one of these statuses means that the endpoint does not offer this."""
    try:
        yield
    except EndpointError as e:
        if e.status in statuses:
            raise NotOffered(f"{what}: {e}") from None
        raise


def ask(
    target: Target,
    prompt: str | tuple[Message, ...],
    *,
    max_tokens: int = TOKENS,
    temperature: float = 0.0,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
) -> ChatReply:
    """One user message or a conversation, one answer; greedy unless told otherwise."""
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop)
    return target.client.chat(messages, sampling, target.model)
