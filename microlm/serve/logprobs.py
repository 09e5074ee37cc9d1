"""Log-probabilities as OpenAI writes them, in chats and completions. Enter: records; leave: JSON objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microlm.core.records import TokenLogprob
from microlm.text.tokenizer import Tokenizer


def of_chat(tokenizer: Tokenizer, known: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat: each token with its bytes, as half a character has no text."""
    content = [
        _token(tokenizer, each.token_id, each.logprob)
        | {"top_logprobs": [_token(tokenizer, i, value) for i, value in each.top]}
        for each in known
    ]
    return {"content": content, "refusal": None}


def of_completion(tokenizer: Tokenizer, known: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion; `offset` is where the first token's text begins."""
    tokens = [_text(tokenizer, each.token_id) for each in known]
    offsets = [offset]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in known],
        "top_logprobs": [{_text(tokenizer, i): value for i, value in each.top} for each in known],
        "text_offset": offsets[:-1],
    }


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes[token_id]
    return {"token": _text(tokenizer, token_id), "logprob": logprob, "bytes": list(raw)}


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes[token_id].decode("utf-8", "replace")
