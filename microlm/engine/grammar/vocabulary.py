"""Our vocabulary in the form that `llguidance` asks for. Control tokens are none of its words."""

from __future__ import annotations

import llguidance

from microlm.text.tokenizer import Tokenizer


class _Words:
    """What `llguidance.TokenizerWrapper` reads off a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Marks such as <think> have bytes, for they are shown; a grammar about text must not choose them.
        control = {*tokenizer.control.values(), *(i for i, w in enumerate(tokenizer.token_bytes) if not w)}
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = sorted(control)
        self.tokens = [
            f"<|special {i}|>".encode() if i in control else word
            for i, word in enumerate(tokenizer.token_bytes)
        ]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._encode(text)


def vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """The words of a tokenizer, with the EOS that may follow a finished answer."""
    words = llguidance.TokenizerWrapper(_Words(tokenizer))
    slices = llguidance.LLTokenizer.json_slices()  # masks of JSON strings are cut from these
    return llguidance.LLTokenizer(words, eos_token=tokenizer.eos_id, slices=slices)
