"""Which bytes of a text each id spells. Enters: a text and its ids. Leaves: places in bytes, or None."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from microlm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Spelling:
    """`places` are (start, end) of each id in the bytes of the text as the tokenizer has normalised it."""

    places: list[tuple[int, int]]
    normalise: Callable[[str], str]

    def size(self, text: str) -> int:
        """The bytes of a beginning of the text."""
        return len(self.normalise(text).encode())


def spelt(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> Spelling | None:
    """The places of ids, as the text stands or in NFC; None when they spell neither."""
    for normalise in (_as_it_is, _nfc):
        places = _places(tokenizer, ids, normalise(text).encode())
        if places is not None:
            return Spelling(places, normalise)
    return None


def _places(tokenizer: Tokenizer, ids: Sequence[int], text: bytes) -> list[tuple[int, int]] | None:
    control = {number: token.encode() for token, number in tokenizer.control.items()}
    places, at = [], 0
    for number in ids:
        piece = control.get(number) or tokenizer.token_bytes[number]
        if not text.startswith(piece, at):  # a control token may swallow the blanks beside it
            blank = len(text) - at - len(text[at:].lstrip())
            if not text.startswith(piece, at + blank):
                return None
            at += blank
        places.append((at, at + len(piece)))
        at += len(piece)
    return places if not text[at:].strip() else None


def _as_it_is(text: str) -> str:
    return text


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
