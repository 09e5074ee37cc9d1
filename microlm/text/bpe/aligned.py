"""Is a vocabulary aligned: can its characters become symbols at once, before any merge between them?

So it is when each merge either stays inside one character or joins whole characters, and comes after the
merges that make these. Then merging character by character and merging byte by byte give the same ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from microlm.text.bpe.apply import Symbols
from microlm.text.bpe.vocabulary import BYTE_OF, Vocabulary

_STAND_IN = {byte: character for character, byte in BYTE_OF.items()}
_Ranks = dict[tuple[str, str], int]


def text_of(token: str) -> str | None:
    """The text of a token as the file writes it, None if its bytes are not whole characters."""
    try:
        return bytes(BYTE_OF[c] for c in token).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None


def aligned(known: Vocabulary) -> tuple[Symbols, set[tuple[int, int]]] | None:
    """The symbol of every code point (−1: none), and which symbols stand side by side in a token.

    None if the vocabulary is not aligned.
    """
    ranks = {pair: rank for rank, pair in enumerate(known.merges)}
    outer: list[tuple[int, str]] = []
    for (left, right), rank in ranks.items():
        text = text_of(left + right)
        if text is not None and text_of(left) is not None and text_of(right) is not None:
            outer.append((rank, text))
        elif not (_is_part(left + right) if text is None else len(text) == 1):
            return None
    symbols, ready = _characters(known, ranks)
    if any(ready.get(c, -1) >= rank for rank, text in outer for c in text):
        return None
    table = np.full(0x110000, -1, dtype=np.int32)
    for character, symbol in symbols.items():
        table[ord(character)] = symbol
    found = {
        (symbols[a], symbols[b])
        for _, text in outer
        for a, b in itertools.pairwise(text)
        if a in symbols and b in symbols
    }
    return table, found


def _is_part(token: str) -> bool:
    """Whether bytes are the beginning, middle or end of one character."""
    first, *rest = (BYTE_OF.get(c, 0) for c in token)
    size = 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1 if first >= 0x80 else 0
    limit = 3 if size == 1 else size - 1  # a piece that begins in the middle has at most three bytes
    return first <= 0xF4 and len(token) <= limit and all(0x80 <= byte < 0xC0 for byte in rest)


def _characters(known: Vocabulary, ranks: _Ranks) -> tuple[dict[str, int], dict[str, int]]:
    """Character → its symbol, and → the highest rank of the merges that make it."""
    symbols, ready = {}, {}
    for character in _single_characters(known.ids):
        parts, highest = _merge([_STAND_IN[byte] for byte in character.encode()], ranks)
        if len(parts) == 1:
            symbols[character], ready[character] = known.ids[parts[0]], highest
    return symbols, ready


def _single_characters(tokens: Iterable[str]) -> Iterable[str]:
    for token in tokens:
        if len(token) <= 4 and (text := text_of(token)) is not None and len(text) == 1:
            yield text


def _merge(parts: list[str], ranks: _Ranks) -> tuple[list[str], int]:
    """Merge the bytes of one character, the lowest rank first; the highest rank that was used."""
    highest = -1
    while len(parts) > 1:
        pairs = enumerate(itertools.pairwise(parts))
        known = [(ranks[pair], x) for x, pair in pairs if pair in ranks]
        if not known:
            break
        rank, at = min(known)
        highest = max(highest, rank)
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
    return parts, highest
