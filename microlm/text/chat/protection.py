"""Control tokens that somebody typed: out of a template's sight and out of the tokenizer's.

Enters: a conversation. Leaves: its messages and tools as templates take them, each typed control token
replaced by a private character that the conversation does not use; texts with them put back; ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from microlm.core.records import Conversation, Message
from microlm.text.read import texts_of
from microlm.text.tokenizer import Tokenizer

_PRIVATE = (0xF0000, 0x10FFFE)


class Protection:
    """The variables of one conversation, and the way back."""

    def __init__(self, chat: Conversation, controls: re.Pattern[str]) -> None:
        texts = texts_of(chat)
        self._controls = controls
        self._typed = sorted({token for text in texts for token in controls.findall(text)})
        self._first = _free(set().union(*texts), len(self._typed)) if self._typed else 0
        self.size = sum(map(len, texts))
        hide = self._hide if self._typed else _same
        self.messages: list[dict[str, Any]] = [_mapped(template_message(m), hide) for m in chat.messages]
        self.tools = [_mapped(json.loads(tool), hide) for tool in chat.tools] or None

    def restore(self, text: str) -> str:
        """A rendered text with what was typed."""
        for number, token in enumerate(self._typed):
            text = text.replace(chr(self._first + number), token)
        return text

    def encode(self, tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
        """The ids of a rendered text: the template's control tokens are control, typed ones are text."""
        if not self._typed:
            yield tokenizer.encode(text, allow_control=True)
            return
        at = 0
        for match in self._controls.finditer(text):
            yield tokenizer.encode(self.restore(text[at : match.start()]))
            yield [tokenizer.control[match[0]]]
            at = match.end()
        yield tokenizer.encode(self.restore(text[at:]))

    def _hide(self, text: str) -> str:
        return self._controls.sub(lambda m: chr(self._first + self._typed.index(m[0])), text)


def _free(used: set[str], count: int) -> int:
    """The first of `count` characters in a row that are not used."""
    start = _PRIVATE[0]
    for code in sorted(ord(c) for c in used if ord(c) >= start):
        if code - start >= count:
            break
        start = code + 1
    assert start + count <= _PRIVATE[1], "a text of all private characters"
    return start


def template_message(message: Message) -> dict[str, Any]:
    """A message as transformers' templates take it."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        found["reasoning_content"] = message.reasoning
    if message.tool_calls:
        found["tool_calls"] = [
            {"type": "function", "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
            for c in message.tool_calls
        ]
    return found


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(v, change) for v in value]
    if isinstance(value, dict):
        return {change(k): _mapped(v, change) for k, v in value.items()}
    return value


def _same(text: str) -> str:
    return text
