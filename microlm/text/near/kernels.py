"""Compiled loops over code points and hashes. Enters, leaves: arrays."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from microlm.text.compiled import njit

Codes = NDArray[np.uint32]
Hashes = NDArray[np.uint64]
Signatures = NDArray[np.uint8]

BINS = 128
"""Values in a signature; a power of two."""
_TABLE = 0x20000  # above lie Han characters and nothing else that is a letter
_ALONE = 1 << 31  # marks a character that is a token by itself
_ALONE_RANGES = (
    (0x1100, 0x1200), (0x3005, 0x3008), (0x3041, 0x3190), (0x31A0, 0x3200), (0x3400, 0x4DC0),
    (0x4E00, 0xA000), (0xA960, 0xA980), (0xAC00, 0xD800), (0xF900, 0xFB00), (0xFF66, 0xFFDD),
    (0x16FE0, 0x19000), (0x1AFF0, 0x1B300),
)  # fmt: skip
"""Han, kana, bopomofo, hangul and other scripts of East Asia that are written without spaces."""
_SMALL_RANGES = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7A4))
"""Han and hangul, which have no other form: not looked at one by one."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_PRIME = np.uint64(0x100000001B3)
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@functools.cache
def fold_table() -> Codes:
    """code point → 0 for what separates, else its small, narrow form, marked if it is a token."""
    table = np.zeros(_TABLE, dtype=np.uint32)
    for low, high in _SMALL_RANGES:
        table[low:high] = np.arange(low, high)
    for code in np.flatnonzero(table == 0).tolist():
        narrow = chr(code - 0xFEE0 if 0xFF01 <= code <= 0xFF5E else code)
        if narrow.isalnum():
            small = next((s for s in (narrow.casefold(), narrow.lower()) if len(s) == 1), narrow)
            table[code] = ord(small)
    for low, high in _ALONE_RANGES:
        table[low:high] |= np.where(table[low:high] > 0, np.uint32(_ALONE), np.uint32(0))
    return table


@njit
def mix(value: np.uint64) -> np.uint64:
    """Spread 64 bits (the end of splitmix64)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@njit
def letters(codes: Codes, fold: Codes, out: Hashes) -> tuple[int, bool]:
    """Hash each letter of a text into `out` (as long as `codes`).

    Returns how many, and whether they are its tokens: if at least as many stand alone as there are words.
    """
    count = alone = words = 0
    in_word = False
    for code in codes:
        if code < _TABLE:
            folded = fold[code]
        else:
            folded = np.uint32(code | _ALONE) if code < 0x40000 else np.uint32(0)
        out[count] = mix(np.uint64(folded) * _BASE)  # in all cases: a branch would cost more
        count += folded != 0
        alone += folded >= _ALONE
        is_letter = (folded != 0) & (folded < _ALONE)
        words += is_letter and not in_word
        in_word = is_letter
    return count, alone > 0 and alone >= words


@njit
def tokens(codes: Codes, fold: Codes, out: Hashes) -> int:
    """Hash the words and the lone characters of a text into `out` (as long as `codes`); returns how many."""
    count = 0
    word = np.uint64(0)  # 0 between words
    for code in codes:
        if code < _TABLE:
            folded = fold[code]
        else:
            folded = np.uint32(code | _ALONE) if code < 0x40000 else np.uint32(0)
        if folded == 0 or folded >= _ALONE:
            if word:
                out[count] = mix(word)
                count += 1
                word = np.uint64(0)
            if folded:
                out[count] = mix(np.uint64(folded) * _BASE)
                count += 1
        else:
            word = ((word ^ np.uint64(folded)) * _PRIME + _BASE) | np.uint64(1)
    if word:
        out[count] = mix(word)
        count += 1
    return count


@njit
def join(hashes: Hashes, count: int, size: int) -> int:
    """Put hashes of `size` tokens in a row in the place of `count` hashes of tokens; returns how many."""
    found = max(0, count - size + 1)
    value, power = np.uint64(0), np.uint64(1)
    for k in range(size if found else 0):
        value = value * _BASE + hashes[k]
        power *= _BASE
    for i in range(found):
        first = hashes[i]
        hashes[i] = mix(value)
        if i + 1 < found:
            value = value * _BASE + hashes[i + size] - first * power
    return found


@njit
def shingle(codes: Codes, fold: Codes, size: int, out: Hashes) -> int:
    """Hash the shingles of a text into `out`; fewer than `size` tokens make one shingle, no token none."""
    count, is_in_characters = letters(codes, fold, out)
    if not is_in_characters:
        count = tokens(codes, fold, out)
    return join(out, count, min(size, count)) if count else 0


@njit
def fill(shingles: Hashes, bins: Hashes) -> None:
    """Fast similarity sketch: P(two texts have the same value in a bin) is the Jaccard of their shingles.

    One pass for a long text. The bins that are left empty are filled by further passes with other hashes, so
    short texts have an unbiased estimate too (Dahlgaard, Knudsen, Thorup: Fast Similarity Sketching, 2017).
    """
    for k in range(BINS):
        bins[k] = _EMPTY
    mask, top = np.uint64(BINS - 1), np.uint64(1) << np.uint64(63)
    for value in shingles:
        at = value & mask
        bins[at] = min(bins[at], value | top)
    done = np.empty(BINS, dtype=np.bool_)
    for turn in range(1, 2 * BINS):
        filled = 0
        for k in range(BINS):
            done[k] = bins[k] != _EMPTY
            filled += done[k]
        if filled == BINS:
            return
        for shingle_hash in shingles:
            value = mix(shingle_hash + np.uint64(turn) * _BASE)
            at = value & mask if turn < BINS else np.uint64(turn - BINS)
            if not done[at]:
                bins[at] = min(bins[at], value | top)


@njit
def decode(
    text: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[Codes, NDArray[np.int64]]:
    """Code points of the UTF-8 text[start : start + size], one text behind the other, and where each ends."""
    count = 0
    for d in range(len(starts)):
        for byte in text[starts[d] : starts[d] + sizes[d]]:
            count += (byte & 0xC0) != 0x80
    codes = np.empty(count, dtype=np.uint32)
    ends = np.empty(len(starts), dtype=np.int64)
    at = 0
    for d in range(len(starts)):
        some = text[starts[d] : starts[d] + sizes[d]]
        i = 0
        while i < len(some):
            code = int(some[i])
            if code < 0x80:
                i += 1
            elif code < 0xE0:
                code = (code & 31) << 6 | int(some[i + 1]) & 63
                i += 2
            elif code < 0xF0:
                code = (code & 15) << 12 | (int(some[i + 1]) & 63) << 6 | int(some[i + 2]) & 63
                i += 3
            else:
                code = (code & 7) << 6 | int(some[i + 1]) & 63
                code = code << 12 | (int(some[i + 2]) & 63) << 6 | int(some[i + 3]) & 63
                i += 4
            codes[at] = code
            at += 1
        ends[d] = at
    return codes, ends


@njit
def sign(
    codes: Codes, ends: NDArray[np.int64], fold: Codes, size: int, rows: int
) -> tuple[Signatures, Hashes]:
    """Signatures [N, BINS] and band keys [N, BINS // rows] of the texts codes[ends[i - 1] : ends[i]]."""
    signatures = np.zeros((len(ends), BINS), dtype=np.uint8)
    bands = np.zeros((len(ends), BINS // rows), dtype=np.uint64)
    bins = np.zeros(BINS, dtype=np.uint64)
    longest = start = 0
    for end in ends:
        longest = max(longest, end - start)
        start = end
    scratch = np.empty(longest, dtype=np.uint64)
    start = 0
    for d in range(len(ends)):
        count = shingle(codes[start : ends[d]], fold, size, scratch)
        start = ends[d]
        if count == 0:
            continue
        fill(scratch[:count], bins)
        for k in range(BINS):
            signatures[d, k] = (bins[k] >> np.uint64(8)) & np.uint64(255)  # the lowest bits name the bin
        for b in range(bands.shape[1]):
            key = np.uint64(b)
            for k in range(b * rows, (b + 1) * rows):
                key = mix(key * _BASE + bins[k])
            bands[d, b] = max(key, np.uint64(1))
    return signatures, bands


@njit
def overlap(a: Hashes, b: Hashes) -> int:
    """How many values two sorted sets share."""
    i = j = shared = 0
    while i < len(a) and j < len(b):
        shared += a[i] == b[j]
        step = a[i] <= b[j]
        j += b[j] <= a[i]
        i += step
    return shared
