"""What training would see of conversations. Enters: messages, a tokenizer. Leaves: cut answers, faulty masks.

An answer is cut when its EOS is not among the first `context` tokens: the model never sees it end.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microlm.core.records import Conversation, Message, Preference
from microlm.text.chat import encode_chats
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
    chats = [(n, chat) for n, record in enumerate(records) for chat in _chats(record)]
    for start in range(0, len(chats), CHUNK):
        some = chats[start : start + CHUNK]
        encoded = encode_chats(loaded, [chat for _, chat in some])
        for (number, chat), (ids, mask) in zip(some, encoded, strict=True):
            ends = np.flatnonzero(np.array(ids) == loaded.eos_id)
            roles = [m.role for m in chat]
            of_answers = [at for at, role in zip(ends.tolist(), roles, strict=False) if role == "assistant"]
            cut = sum(at >= context for at in of_answers)
            yield Seen(number, len(ids), len(of_answers), cut, fault(loaded, chat, ids, mask))


def fault(tokenizer: Tokenizer, chat: Sequence[Message], ids: Sequence[int], mask: Sequence[int]) -> str:
    """Why a loss mask is wrong: answers with their EOS are labels, nothing else; text makes no control."""
    if len(ids) != len(mask):
        return "mask_of_another_length"
    if not any(mask):
        return "nothing_to_learn"
    starts = [i for i, token in enumerate(ids) if token == tokenizer.start_id]
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
    if len(starts) != len(chat) or len(ends) != len(chat) or tokenizer.pad_id in ids:
        return "control_token_from_text"
    for message, start, end in zip(chat, starts, ends, strict=True):
        learn = message.role == "assistant"
        if mask[end] != learn:
            return "eos_of_answer_not_labelled" if learn else "label_outside_answers"
        if not learn and any(mask[start:end]):
            return "label_outside_answers"
        if learn and message.content and not any(mask[start:end]):
            return "answer_not_labelled"
    return ""


def _chats(record: Record) -> list[tuple[Message, ...]]:
    if isinstance(record, Conversation):
        return [record.messages]
    if isinstance(record, Preference):
        return [(*record.prompt, Message("assistant", a)) for a in (record.chosen, record.rejected)]
    return []


@functools.lru_cache(maxsize=1)
def _load(path: Path) -> Tokenizer:
    return Tokenizer.load(path)
