"""Texts → ids, compiled. Enters: code points of many texts, flat tables. Leaves: ids in a row, ends.

A vocabulary none of whose merges joins part of one character with another is *aligned*: its characters
become symbols at once, and a stretch ends where no token holds two neighbours side by side. Any other works
byte by byte, and copies what was merged before from where it stands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microlm.text.bpe.apply import ABSENT, SHORT, Rows, Symbols, find, join
from microlm.text.bpe.pieces import Classes, Codes, Rule, piece_end, segment_end
from microlm.text.compiled import njit

Ids = NDArray[Any]  # uint16 or uint32
Ends = NDArray[np.int64]
Neighbours = NDArray[np.uint8]
CHARACTERS = 256  # where the symbols of characters begin, behind those of the bytes
_LAST_PLACE = (1 << 31) - 1  # that the cache of pieces can hold
CACHED_CHARS = 32  # of a piece that is remembered
_ROOM = max(SHORT, 4 * CACHED_CHARS)
_CACHE_BITS = 15
_SEED, _MIX = np.uint64(0xCBF2_9CE4_8422_2325), np.uint64(0x9E37_79B9_7F4A_7C15)
_CACHE_SHIFT, _TAG = np.uint64(64 - _CACHE_BITS), np.uint64(0x7FFF_FFFF)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFF_FFFF)


class Whole(NamedTuple):
    """Tokens that a piece becomes without merging: code points in a row, ends, ids, and a table of them."""

    codes: Codes
    ends: Ends
    ids: Symbols
    slots: Symbols


class Tables(NamedTuple):
    """A vocabulary as the kernels take it.

    `symbols` are those of the 256 bytes, then of all code points (−1: none) if the vocabulary is aligned;
    `neighbours` is 1 where `neighbour_slot` of two symbols falls that some token holds side by side.
    """

    classes: Classes
    rule: Rule
    symbols: Symbols
    rows: Rows
    neighbours: Neighbours
    whole: Whole


@njit
def neighbour_slot(neighbours: Neighbours, left: int, right: int) -> np.uint64:
    """Where a pair falls; two pairs in one slot only make a stretch longer than it need be."""
    key = (np.uint64(left) << _HALF) | np.uint64(right)
    return ((key * _MIX) >> _HALF) & np.uint64(len(neighbours) - 1)


@njit
def encode_aligned(codes: Codes, ends: Ends, tables: Tables, closing: int, out: Ids, out_ends: Ends) -> int:
    """Write the ids of all texts to `out` (room: 4 a code point and 1 a text); returns how many they are.

    `closing` is put after every text unless it is negative.
    """
    classes, rule, symbols, rows, neighbours, _ = tables
    ids, values = np.empty(_ROOM, np.int32), np.empty(_ROOM, np.uint64)
    start, written = 0, 0
    for text in range(len(ends)):
        end = ends[text]
        segment = start
        while start < end:
            if start >= segment:
                segment = segment_end(codes, start, end, classes, rule)
            piece = piece_end(codes, start, segment, classes, rule)
            while start < piece:
                begin = start
                symbol = symbols[CHARACTERS + codes[start]]
                start += 1
                if symbol < 0:
                    count = join(ids, values, _utf8(codes, begin, start, symbols, ids), rows)
                    written = _put(ids, count, out, written)
                    continue
                ids[0] = symbol
                limit = min(piece, begin + SHORT)
                while start < limit:
                    after = symbols[CHARACTERS + codes[start]]
                    if after < 0 or not neighbours[neighbour_slot(neighbours, symbol, after)]:
                        break
                    ids[start - begin] = symbol = after
                    start += 1
                size = start - begin
                if size == 1:
                    out[written] = symbol
                    written += 1
                elif size == 2:
                    written = _put_pair(ids, rows, out, written)
                elif size < SHORT:
                    written = _put(ids, join(ids, values, size, rows), out, written)
                else:
                    start = _stretch_end(codes, start, piece, symbols, neighbours)
                    written += _join_characters(codes, begin, start, symbols, rows, out[written:])
        if closing >= 0:
            out[written] = closing
            written += 1
        out_ends[text] = written
    return written


@njit
def encode_bytes(codes: Codes, ends: Ends, tables: Tables, closing: int, out: Ids, out_ends: Ends) -> int:
    """The same for a vocabulary that is not aligned."""
    classes, rule, symbols, rows, _, whole = tables
    ids, values, cache = np.empty(_ROOM, np.int32), np.empty(_ROOM, np.uint64), _empty_cache()
    start, written = 0, 0
    for text in range(len(ends)):
        end = ends[text]
        segment = start
        while start < end:
            if start >= segment:
                segment = segment_end(codes, start, end, classes, rule)
            piece = piece_end(codes, start, segment, classes, rule)
            size = piece - start
            count = _recall(codes, start, size, cache, out, written)
            if count == 0:
                if len(whole.ids):
                    count = _take_whole(codes, start, piece, whole, out, written)
                if count == 0 and size <= CACHED_CHARS:
                    count = join(ids, values, _utf8(codes, start, piece, symbols, ids), rows)
                    _put(ids, count, out, written)
                elif count == 0:
                    count = _join_bytes(codes, start, piece, symbols, rows, out[written:])
                _remember(codes, start, size, cache, written, count)
            written += count
            start = piece
        if closing >= 0:
            out[written] = closing
            written += 1
        out_ends[text] = written
    return written


@njit
def _put_pair(ids: Symbols, rows: Rows, out: Ids, written: int) -> int:
    value = find(rows, ids[0], ids[1])
    if value != ABSENT:
        out[written] = value & _LOW
        return written + 1
    out[written] = ids[0]
    out[written + 1] = ids[1]
    return written + 2


@njit
def _stretch_end(codes: Codes, start: int, end: int, symbols: Symbols, neighbours: Neighbours) -> int:
    """Where a stretch ends that goes on at `start`."""
    symbol = symbols[CHARACTERS + codes[start - 1]]
    while start < end:
        after = symbols[CHARACTERS + codes[start]]
        if after < 0 or not neighbours[neighbour_slot(neighbours, symbol, after)]:
            break
        symbol = after
        start += 1
    return start


@njit
def _join_characters(codes: Codes, start: int, end: int, symbols: Symbols, rows: Rows, out: Ids) -> int:
    """Merge a long stretch of characters; returns how many ids it becomes."""
    ids = np.empty(end - start, dtype=np.int32)
    for x in range(len(ids)):
        ids[x] = symbols[CHARACTERS + codes[start + x]]
    count = join(ids, np.empty(len(ids), dtype=np.uint64), len(ids), rows)
    return _put(ids, count, out, 0)


@njit
def _join_bytes(codes: Codes, start: int, end: int, symbols: Symbols, rows: Rows, out: Ids) -> int:
    """Merge the bytes of a long piece; returns how many ids it becomes."""
    ids = np.empty(4 * (end - start), dtype=np.int32)
    size = _utf8(codes, start, end, symbols, ids)
    return _put(ids, join(ids, np.empty(size, dtype=np.uint64), size, rows), out, 0)


@njit
def _utf8(codes: Codes, start: int, end: int, symbols: Symbols, ids: Symbols) -> int:
    """The symbols of the bytes of some characters; returns how many they are."""
    count = 0
    for x in range(start, end):
        code = np.int64(codes[x])
        if code < 0x80:
            ids[count] = symbols[code]
            count += 1
            continue
        lead, following = (0xC0, 1) if code < 0x800 else (0xE0, 2) if code < 0x10000 else (0xF0, 3)
        ids[count] = symbols[lead | code >> 6 * following]
        for y in range(following):
            ids[count + 1 + y] = symbols[0x80 | code >> 6 * (following - 1 - y) & 0x3F]
        count += 1 + following
    return count


@njit
def _put(ids: Symbols, count: int, out: Ids, written: int) -> int:
    for x in range(count):
        out[written + x] = ids[x]
    return written + count


@njit
def _empty_cache() -> Symbols:
    """Of what was merged before: a tag, where it stands in the codes and in the ids, both sizes."""
    return np.full((1 << _CACHE_BITS, 4), -1, np.int32)


@njit
def _recall(codes: Codes, start: int, size: int, cache: Symbols, out: Ids, written: int) -> int:
    """Copy the ids of equal characters that came before; returns how many they are, 0 if none came."""
    if size > CACHED_CHARS:
        return 0
    key = _hash(codes, start, start + size)
    slot = key >> _CACHE_SHIFT
    if cache[slot, 0] != np.int32(key & _TAG) or cache[slot, 3] >> 16 != size:
        return 0
    before = cache[slot, 1]
    for x in range(size):
        if codes[before + x] != codes[start + x]:
            return 0
    place, count = cache[slot, 2], cache[slot, 3] & 0xFFFF
    for x in range(count):
        out[written + x] = out[place + x]
    return count


@njit
def _remember(codes: Codes, start: int, size: int, cache: Symbols, written: int, count: int) -> None:
    if size > CACHED_CHARS or max(start, written) > _LAST_PLACE:
        return
    key = _hash(codes, start, start + size)
    slot = key >> _CACHE_SHIFT
    cache[slot, 0] = np.int32(key & _TAG)
    cache[slot, 1] = start
    cache[slot, 2] = written
    cache[slot, 3] = size << 16 | count


@njit
def _take_whole(codes: Codes, start: int, end: int, whole: Whole, out: Ids, written: int) -> int:
    """Write the token that a piece is; returns 1, or 0 if there is no such token."""
    token = whole.slots[_whole_slot(whole, codes, start, end)]
    if token < 0:
        return 0
    out[written] = whole.ids[token]
    return 1


@njit
def fill_whole(whole: Whole) -> None:
    """Enter all tokens into the table."""
    begin = 0
    for token in range(len(whole.ids)):
        end = whole.ends[token]
        whole.slots[_whole_slot(whole, whole.codes, begin, end)] = token
        begin = end


@njit
def _whole_slot(whole: Whole, codes: Codes, start: int, end: int) -> int:
    """Where the token of these code points is in `whole.slots`, or the empty slot where it would be."""
    last = len(whole.slots) - 1
    slot = int(_hash(codes, start, end) >> _HALF) & last
    while whole.slots[slot] >= 0:
        token = whole.slots[slot]
        begin = whole.ends[token - 1] if token > 0 else 0
        if whole.ends[token] - begin == end - start:
            same = 0
            while same < end - start and whole.codes[begin + same] == codes[start + same]:
                same += 1
            if same == end - start:
                break
        slot = (slot + 1) & last
    return slot


@njit
def _hash(codes: Codes, start: int, end: int) -> np.uint64:
    key = _SEED
    for x in range(start, end):
        key = (key ^ np.uint64(codes[x])) * _MIX
    return key
