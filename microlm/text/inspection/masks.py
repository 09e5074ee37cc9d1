"""What training would see of conversations. Enters: messages, a tokenizer. Leaves: cut answers, faulty masks.

An answer is cut when its EOS is not among the first `context` tokens: the model never sees it end.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Message, Preference, words_of
from microlm.text.chat import encode_chats, template_of
from microlm.text.chat.chatml import ChatML
from microlm.text.chat.pairs import sides
from microlm.text.read import Record
from microlm.text.tokenizer import Tokenizer

CHUNK = 256


@dataclass(frozen=True, slots=True)
class Seen:
    """A conversation in tokens; `fault` is empty when its mask is as it must be."""

    record: int
    tokens: int
    answers: int
    cut: int
    fault: str


def look(tokenizer: Path, context: int, records: Sequence[Record]) -> Iterator[Seen]:
    """What training sees of the conversations among the records; a preference is two of them."""
    loaded = _load(tokenizer)
    template = template_of(loaded)
    chats = [(n, chat) for n, record in enumerate(records) for chat in _chats(record)]
    for start in range(0, len(chats), CHUNK):
        some = chats[start : start + CHUNK]
        if isinstance(template, ChatML):
            encoded = encode_chats(loaded, [chat for _, chat in some])
            for (number, chat), (ids, mask) in zip(some, encoded, strict=True):
                why = fault(loaded, template.turns(chat), ids, mask)
                yield _seen(number, context, ids, mask, why)
        else:
            yield from (_foreign(loaded, context, number, chat) for number, chat in some)


def fault(tokenizer: Tokenizer, turns: Sequence[Message], ids: Sequence[int], mask: Sequence[int]) -> str:
    """Why a loss mask is wrong: answers with their EOS are labels, nothing else; text makes no control."""
    if len(ids) != len(mask):
        return "mask_of_another_length"
    if not any(mask):
        return "nothing_to_learn"
    starts = [i for i, token in enumerate(ids) if token == tokenizer.start_id]
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
    if len(starts) != len(turns) or len(ends) != len(turns) or tokenizer.pad_id in ids:
        return "control_token_from_text"
    for message, start, end in zip(turns, starts, ends, strict=True):
        learn = message.role == "assistant"
        if mask[end] != learn:
            return "eos_of_answer_not_labelled" if learn else "label_outside_answers"
        if not learn and any(mask[start:end]):
            return "label_outside_answers"
        if learn and any(words_of(message)) and not any(mask[start:end]):
            return "answer_not_labelled"
    return ""


def _foreign(tokenizer: Tokenizer, context: int, number: int, chat: Conversation) -> Seen:
    """A conversation in an adopted template; what that refuses has no mask to look at."""
    try:
        [(ids, mask)] = encode_chats(tokenizer, [chat])
    except UserError:
        return Seen(number, 0, 0, 0, "refused_by_template")
    seen = _seen(number, context, ids, mask, "" if any(mask) else "nothing_to_learn")
    answers = sum(m.role == "assistant" for m in chat.messages)
    return seen if seen.fault or seen.answers == answers else replace(seen, fault="answer_not_labelled")


def _seen(number: int, context: int, ids: Sequence[int], mask: Sequence[int], why: str) -> Seen:
    """The answers are the stretches of labels."""
    ends = [i for i, learn in enumerate(mask) if learn and not any(mask[i + 1 : i + 2])]
    return Seen(number, len(ids), len(ends), sum(end >= context for end in ends), why)


def _chats(record: Record) -> list[Conversation]:
    if isinstance(record, Conversation):
        return [record]
    if isinstance(record, Preference):
        return list(sides(record))
    return []


@functools.lru_cache(maxsize=1)
def _load(path: Path) -> Tokenizer:
    return Tokenizer.load(path)
