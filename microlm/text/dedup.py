"""Exact duplicates by content. Enters: text. Leaves: a 128-bit digest of what it says, a set of them.

Two texts are equal when they differ only in width, case, whitespace and punctuation.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

from microlm.core.records import Conversation, Document, Extraction
from microlm.text.clean import normalised
from microlm.text.read import Record

DIGEST_BYTES = 16
_EMPTY = bytes(DIGEST_BYTES)
_BETWEEN = "\ue000"  # private use: cleaning leaves none in a text, normalisation leaves it alone
# after NFKC: whitespace, ASCII punctuation without operators ($ + < = > ^ | ~), general and CJK punctuation
_WIDE = re.compile("[！-＃％-＊，-／：；？＠［-］＿｛｝　…]+")
_SKIPPED = re.compile(r"[\s!-#%-*,-/:;?@\[-\]_`{}¡§«¶·»¿‐-‧‰-⁞、-〃〈-】〔-〟・]+")


def digest(text: str) -> bytes:
    """16 bytes of sha256 over the normalised text (NFKC, casefold, without whitespace and punctuation)."""
    bare = _WIDE.sub("", text)  # what NFKC makes punctuation of: without it most texts are in normal form
    folded = (bare if unicodedata.is_normalized("NFKC", bare) else normalised("NFKC", bare)).casefold()
    return hashlib.sha256(_SKIPPED.sub("", folded).encode("utf-8")).digest()[:DIGEST_BYTES]


def record_digest(record: Record) -> bytes:
    """The digest of what a record says: its text, or all turns of a conversation or preference."""
    if isinstance(record, Document | Extraction):
        return digest(record.text)
    turns = record.messages if isinstance(record, Conversation) else record.prompt
    said = [part for turn in turns for part in (turn.role, turn.content)]
    if not isinstance(record, Conversation):
        said += [record.chosen, record.rejected]
    return digest(_BETWEEN.join(said))


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
