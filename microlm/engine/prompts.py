"""What a caller may ask with (raw text, a conversation or ids) → checked ids, or one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Message
from microlm.text.chat import chat_ids
from microlm.text.read import texts_of
from microlm.text.tokenizer import Tokenizer

Prompt = str | Conversation | Sequence[Message] | Sequence[int]
"""Messages are a conversation without tools."""


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, vocab_size: int) -> list[int]:
    """The prompt's ids: text as it is, messages through the chat template, the assistant's turn opened."""
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        _check_text(prompt)
        ids = tokenizer.encode(prompt)
    elif isinstance(prompt, Conversation):
        for text in texts_of(prompt):
            _check_text(text)
        ids = chat_ids(tokenizer, prompt, generation_prompt=True)
    elif isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise UserError(f"prompt: expected a text, messages or ids, found {type(prompt).__name__}")
    elif prompt and isinstance(prompt[0], Message):
        chat = Conversation(tuple(m for m in prompt if isinstance(m, Message)))
        return encode_prompt(tokenizer, chat, vocab_size)
    else:
        ids = [int(i) for i in prompt if isinstance(i, int | np.integer)]
        if len(ids) != len(prompt) or any(not 0 <= i < vocab_size for i in ids):
            raise UserError(f"prompt: every id must be a whole number from 0 to {vocab_size - 1}")
    if not ids:
        raise UserError("prompt: is empty; write at least one character")
    return ids


def check_window(length: int, window: int) -> None:
    """Refuse a prompt that leaves no room for one new token."""
    if length >= window:
        raise UserError(
            f"prompt: {length} tokens, but the window is {window} and must hold at least one new token; "
            "shorten the prompt or raise max_seq_len"
        )


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(
            f"prompt: character {e.start} is half of a surrogate pair, not text; remove it"
        ) from None
