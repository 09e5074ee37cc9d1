"""Exact duplicates by content. Enters: text. Leaves: a 128-bit digest of what it says, a set of them.

Two texts are equal when they differ only in width, case, whitespace and punctuation.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

from microlm.core.records import Conversation, Document, Extraction, words_of
from microlm.text.clean import normalised
from microlm.text.compiled import njit
from microlm.text.read import Record
from microlm.text.rules.profile import code_points

DIGEST_BYTES = 16
_EMPTY = bytes(DIGEST_BYTES)
_BETWEEN = "\ue000"  # private use: cleaning leaves none in a text, normalisation leaves it alone
# after NFKC: whitespace, ASCII punctuation without operators ($ + < = > ^ | ~), general and CJK punctuation
_WIDE = re.compile("[！-＃％-＊，-／：；？＠［-］＿｛｝　…]+")
_SKIPPED = re.compile(r"[\s!-#%-*,-/:;?@\[-\]_`{}¡§«¶·»¿‐-‧‰-⁞、-〃〈-】〔-〟・]+")
_TABLE = 0x1FC00
_HAN = 0x20000, 0x2F800  # behind the table: what no normal form changes
_HARD = 0xFFFFFFFF
_ONE_BY_ONE = (
    (0x0001, 0x1100),
    (0x1200, 0x3400),
    (0xA000, 0xA960),
    (0xA980, 0xAC00),
    (0xF900, 0x10000),
    (0x1F300, 0x1FB00),
)
_THEMSELVES = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xF900))
"""Han, hangul, private use: what no normal form changes; the ranges leave out jamo."""


def digest(text: str) -> bytes:
    """16 bytes of sha256 over the normalised text (NFKC, casefold, without whitespace and punctuation)."""
    codes = code_points(text)
    out = np.empty(4 * len(codes), dtype=np.uint8)
    size = _fold(codes, _fold_table(), out)  # the same as `fold`, in a tenth of its time
    said = out[:size].data if size >= 0 else fold(text).encode("utf-8")
    return hashlib.sha256(said).digest()[:DIGEST_BYTES]


def fold(text: str) -> str:
    """What a text says: in NFKC, folded, without whitespace and punctuation."""
    bare = _WIDE.sub("", text)  # what NFKC makes punctuation of: without it most texts are in normal form
    folded = (bare if unicodedata.is_normalized("NFKC", bare) else normalised("NFKC", bare)).casefold()
    return _SKIPPED.sub("", folded)


@functools.cache
def _fold_table() -> NDArray[np.uint32]:
    """code point → 0 for what is left out, `fold` of it, or _HARD: look at the whole text."""
    table = np.full(_TABLE, _HARD, dtype=np.uint32)
    for low, high in _THEMSELVES:
        table[low:high] = np.arange(low, high)
    for code in (c for low, high in _ONE_BY_ONE for c in range(low, high)):
        said = fold(chr(code))
        if len(said) < 2 and said < chr(_TABLE) and not any(map(_may_join, (chr(code), *said))):
            table[code] = ord(said) if said else 0
    return table


@njit
def _fold(codes, table, out):  # type: ignore[no-untyped-def]
    """Write `fold` of a text into `out` in UTF-8; its size, or -1 if a character is hard."""
    size = 0
    for code in codes:
        if code < _TABLE:
            value = table[code]
        else:
            value = code if _HAN[0] <= code < _HAN[1] else np.uint32(_HARD)
        if value == _HARD:
            return -1
        if value == 0:
            continue
        if value < 0x80:
            out[size] = value
            size += 1
        elif value < 0x800:
            out[size] = 0xC0 | value >> 6
            out[size + 1] = 0x80 | value & 0x3F
            size += 2
        elif value < 0x10000:
            out[size] = 0xE0 | value >> 12
            out[size + 1] = 0x80 | value >> 6 & 0x3F
            out[size + 2] = 0x80 | value & 0x3F
            size += 3
        else:
            out[size] = 0xF0 | value >> 18
            out[size + 1] = 0x80 | value >> 12 & 0x3F
            out[size + 2] = 0x80 | value >> 6 & 0x3F
            out[size + 3] = 0x80 | value & 0x3F
            size += 4
    return size


def _may_join(char: str) -> bool:
    """Whether a normal form can make one character of it and the one before: marks and jamo."""
    return unicodedata.category(char).startswith("M") or "\u1100" <= char <= "\u11ff"


def record_digest(record: Record) -> bytes:
    """The digest of what a record says: its text, or all turns of a conversation or preference.

    The half of a preference's that places it in a split is its prompt's: no prompt is in two splits.
    """
    if isinstance(record, Document | Extraction):
        return digest(record.text)
    turns = record.messages if isinstance(record, Conversation) else record.prompt
    said = [*record.tools, *(part for turn in turns for part in (turn.role, *words_of(turn)))]
    asked = digest(_BETWEEN.join(said))
    if isinstance(record, Conversation):
        return asked
    half = DIGEST_BYTES // 2
    return digest(_BETWEEN.join([*said, record.chosen, record.rejected]))[:half] + asked[half:]


class DigestSet:
    """A set of digests in one flat table: 16 bytes a slot, 20–40 bytes a document.

    Open addressing; a Python set of the same would take about 130 bytes a document.
    """

    def __init__(self) -> None:
        self._slots = 1024
        self._table = bytearray(self._slots * DIGEST_BYTES)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: bytes) -> bool:
        at = self._find(key)
        return self._table[at : at + DIGEST_BYTES] == key

    def add(self, key: bytes) -> bool:
        """Put a digest in; True when it was not there before."""
        at = self._find(key)
        if self._table[at : at + DIGEST_BYTES] == key:
            return False
        self._table[at : at + DIGEST_BYTES] = key
        self._count += 1
        if 5 * self._count > 4 * self._slots:
            self._grow()
        return True

    def _find(self, key: bytes) -> int:
        """The byte offset of the key's slot, or of the free slot where it belongs."""
        slot = int.from_bytes(key[:8], "little") % self._slots
        while True:
            at = slot * DIGEST_BYTES
            held = self._table[at : at + DIGEST_BYTES]
            if held in (key, _EMPTY):
                return at
            slot = (slot + 1) % self._slots

    def _grow(self) -> None:
        old = self._table
        self._slots *= 2
        self._table = bytearray(self._slots * DIGEST_BYTES)
        for start in range(0, len(old), DIGEST_BYTES):
            held = bytes(old[start : start + DIGEST_BYTES])
            if held != _EMPTY:
                at = self._find(held)
                self._table[at : at + DIGEST_BYTES] = held
