"""Preferences → pairs of conversations with one prompt, of which the last answer alone is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from microlm.core.records import Conversation, Preference
from microlm.text.chat import encode_chats
from microlm.text.sources.marked import answered
from microlm.text.tokenizer import Tokenizer

Encoded = tuple[list[int], list[int]]
"""Ids of a conversation and its mask."""


def sides(pair: Preference) -> tuple[Conversation, Conversation]:
    """The prompt with the preferred answer, and with the rejected one."""
    chosen, rejected = (
        Conversation((*pair.prompt, answered(text)), pair.task, tools=pair.tools)
        for text in (pair.chosen, pair.rejected)
    )
    return chosen, rejected


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Preference]) -> Iterator[tuple[Encoded, Encoded]]:
    """Ids and mask of both sides of each pair; earlier answers of the prompt are context, not labels."""
    chats = [chat for pair in pairs for chat in sides(pair)]
    encoded = ((ids, last_answer(mask)) for ids, mask in encode_chats(tokenizer, chats))
    yield from zip(encoded, encoded, strict=True)


def last_answer(mask: list[int]) -> list[int]:
    """The mask without its answers but the last one: an answer is a stretch of labels."""
    end = len(mask)
    while end and not mask[end - 1]:
        end -= 1
    start = end
    while start and mask[start - 1]:
        start -= 1
    return [0] * start + mask[start:]
