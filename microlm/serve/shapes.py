"""OpenAI's answers. Enters: what the engine made; leave: response objects and stream chunks.

Ours is `error`: it stands in a choice that was cut off inside its constraint, and says where.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

Logprobs = dict[str, Any] | None


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The token counts of one request."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def event(value: Any) -> bytes:
    """One server-sent event; characters stay whole, a newline inside is escaped by JSON."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Envelope:
    """What is equal in all parts of one answer. `chat` decides OpenAI's object names and fields."""

    model: str
    chat: bool
    include_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[tuple[str, str, Logprobs, str]], counts: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece from (text, finish_reason, logprobs, error) of every choice."""
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {
            "choices": [self._choice(i, *c[:3]) | _error(c[3]) for i, c in enumerate(choices)],
            "usage": counts,
        }

    def opening(self, index: int) -> dict[str, Any]:
        """A chat stream's first chunk of a choice: the role."""
        return self._chunk([self._delta(index, {"role": "assistant", "content": ""}, None)])

    def piece(self, index: int, text: str, logprobs: Logprobs = None) -> dict[str, Any]:
        """A chunk with some text, and the log-probabilities of the tokens that came."""
        if self.chat:
            return self._chunk([self._delta(index, {"content": text}, None, logprobs)])
        return self._chunk([self._choice(index, text, None, logprobs)])

    def closing(self, index: int, reason: str, error: str = "") -> dict[str, Any]:
        """The last chunk of a choice: why it ended."""
        choice = self._delta(index, {}, reason) if self.chat else self._choice(index, "", reason)
        return self._chunk([choice | _error(error)])

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last choice's end, with the usage and no choices."""
        return self._chunk([]) | {"usage": counts}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        return {"id": prefix + self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = self._head(kind) | {"choices": choices}
        return head | {"usage": None} if self.include_usage else head

    def _choice(self, index: int, text: str, reason: str | None, logprobs: Logprobs = None) -> dict[str, Any]:
        if self.chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}

    def _delta(
        self, index: int, delta: dict[str, str], reason: str | None, logprobs: Logprobs = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _error(error: str) -> dict[str, str]:
    return {"error": error} if error else {}
