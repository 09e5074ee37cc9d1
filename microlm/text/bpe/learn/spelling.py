"""Characters and bytes: UTF-8 of chunks for exact training, and the beginnings of characters for aligned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from microlm.text.bpe.learn.chunks import SEPARATOR, Columns
from microlm.text.bpe.learn.initial import Ints, Places
from microlm.text.bpe.vocabulary import BYTE_OF
from microlm.text.compiled import njit

BYTES = bytes(BYTE_OF[stand_in] for stand_in in sorted(BYTE_OF))
"""All bytes in the order of their ids: that of GPT-2's stand-in characters."""
_ASCII = 0x80
_BEGINNINGS = ((0x800, 0x10000, 6, 2), (0x10000, 0x110000, 12, 2), (0x10000, 0x110000, 6, 3))
# characters from, to; bits that the beginning leaves open; its bytes


@dataclass(frozen=True)
class Part:
    """A token inside a character: the character (several bytes), or its beginning (two bytes or three)."""

    count: int
    text: bytes
    is_whole: bool


def parts_of(characters: Ints, least: int) -> list[Part]:
    """The characters and beginnings of characters that occur `least` times, the most frequent first.

    `characters` counts every code point. Of two as frequent, what the other begins with comes first.
    """
    codes = np.arange(_ASCII, len(characters))
    counts = characters[_ASCII:]
    found = [Part(int(counts[i]), chr(codes[i]).encode(), True) for i in np.flatnonzero(counts >= least)]
    for first, last, bits, size in (
        (0x800, 0x10000, 6, 2),
        (0x10000, 0x110000, 12, 2),
        (0x10000, 0x110000, 6, 3),
    ):
        sums = np.add.reduceat(characters[first:last], np.arange(0, last - first, 1 << bits))
        for i in np.flatnonzero(sums >= max(least, 1)):
            begun = _utf8(first + (int(i) << bits))[:size]
            found.append(Part(int(sums[i]), begun, False))
    return sorted(found, key=lambda part: (-part.count, part.is_whole, len(part.text), part.text))


def _utf8(code: int) -> bytes:
    return chr(code).encode("utf-8", "surrogatepass")


def byte_columns(columns: Columns) -> Columns:
    """The same chunks in UTF-8; a symbol is the number of its byte in `BYTES`."""
    ranks = np.empty(256, dtype=np.int32)
    ranks[np.frombuffer(BYTES, dtype=np.uint8)] = np.arange(256)
    return _spelled(columns, ranks)


@njit
def _spelled(columns: Columns, ranks: Places) -> Columns:
    size = len(columns.weights) + 1
    for code in columns.symbols:
        if code >= 0:
            size += 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    symbols = np.empty(size, dtype=np.int32)
    begins = np.empty(len(columns.begins), dtype=np.int64)
    used = chunk = 0
    for symbol in columns.symbols:
        code = int(symbol)
        if code < 0:
            symbols[used] = SEPARATOR
            used += 1
            begins[chunk] = used
            chunk += 1
            continue
        size = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
        if size == 1:
            symbols[used] = ranks[code]
        else:
            symbols[used] = ranks[(0xF00 >> size & 0xFF) | code >> 6 * (size - 1)]
            for i in range(1, size):
                symbols[used + i] = ranks[0x80 | (code >> 6 * (size - 1 - i) & 0x3F)]
        used += size
    return Columns(begins, columns.weights, symbols)
