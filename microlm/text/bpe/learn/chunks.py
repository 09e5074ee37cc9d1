"""Second pass: the distinct chunks of all pieces and how often each occurs.

A piece is cut between two characters that are neighbours fewer than `cut` times: no token that occurs so
often reaches across. Enters: texts. Leaves: symbols in a row, as `merges` takes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microlm.text.bpe.learn.count import pair_key
from microlm.text.bpe.learn.table import OutOfMemory, Table, find, spread
from microlm.text.bpe.pieces import Classes, Codes, Rule, classes, code_points, piece_end, segment_end
from microlm.text.compiled import njit

Symbols = NDArray[np.int32]
Text = Codes | Symbols

SEPARATOR = -1
"""Stands before the first chunk and after every chunk."""
_FIRST_SLOTS = 1 << 12
_PAID = 1 << 12  # characters for which room is made at once
_TAG = 31  # bits of a hash that are kept beside the number of the chunk
_CHUNKS, _USED = range(2)


class Store(NamedTuple):
    """Chunk k is `symbols[begins[k] : begins[k + 1] - 1]` and occurs `weights[k]` times.

    `slots` find a chunk by its hash; `state` counts the chunks and the symbols in use.
    """

    slots: NDArray[np.int64]
    begins: NDArray[np.int64]
    weights: NDArray[np.int64]
    symbols: Symbols
    state: NDArray[np.int64]


class Chunks:
    """Distinct chunks with counts in bounded memory: when they do not fit, they are cut at more places.

    There are at most `most` symbols. Without `frequent` no piece is cut.
    """

    def __init__(self, rule: Rule, frequent: Table | None, cut: int, most: int) -> None:
        self.rule, self.cut, self.texts = rule, cut if frequent is not None else 0, 0
        self.frequent = frequent if frequent is not None else np.zeros((1, 2), dtype=np.int64)
        self._most = most
        self.store = self._new()

    def add(self, texts: list[str]) -> None:
        """Count the chunks of some texts."""
        codes, ends = code_points(texts)
        place = (0, 0)
        while place[0] < len(codes):
            self.store, place = _count(
                codes, ends, place, classes(), self.rule, self.frequent, self.cut, self.store
            )
            if place[0] < len(codes):
                self._cut_more()
        self.texts += len(texts)

    def save(self, folder: Path) -> None:
        """Write the chunks for another process."""
        for name, column in self.columns()._asdict().items():
            np.save(folder / f"{name}.npy", column)
        np.save(folder / "head.npy", np.array([self.texts, self.cut]))

    def take(self, folder: Path) -> None:
        """Add the chunks that another process saved."""
        texts, cut = np.load(folder / "head.npy")
        self.texts += int(texts)
        while self.cut < cut:
            self._cut_more()
        more = Columns(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Columns._fields))
        done = 0
        while done < len(more.weights):
            self.store, done = _add_all(more, done, self.frequent, self.cut, self.store)
            if done < len(more.weights):
                self._cut_more()

    def columns(self) -> Columns:
        """The chunks without what finds them."""
        return columns(self.store)

    def _cut_more(self) -> None:
        """Cut at more places, until there is room again."""
        highest = int(self.frequent[:, 1].max()) if self.cut else 0
        before, done = self.columns(), -1
        while done < len(before.weights):
            if self.cut > highest or not highest:
                raise OutOfMemory
            self.cut += self.cut // 4 + 1
            self.store = self._new()
            self.store, done = _add_all(before, 0, self.frequent, self.cut, self.store)

    def _new(self) -> Store:
        """An empty store. Its arrays are as long as they may ever be; what is not written takes no memory."""
        symbols = np.empty(self._most + 1, dtype=np.int32)
        symbols[0] = SEPARATOR
        chunks = self._most // 2 + 1  # the shortest is one symbol and a separator
        begins, weights = np.empty(chunks + 1, dtype=np.int64), np.empty(chunks, dtype=np.int64)
        begins[0] = 1
        slots = np.full(_FIRST_SLOTS, -1, dtype=np.int64)
        return Store(slots, begins, weights, symbols, np.array([0, 1], dtype=np.int64))


class Columns(NamedTuple):
    """What of a store is in use, less its slots."""

    begins: NDArray[np.int64]
    weights: NDArray[np.int64]
    symbols: Symbols


def columns(store: Store) -> Columns:
    """The used parts of a store's arrays, not copied."""
    chunks, used = int(store.state[_CHUNKS]), int(store.state[_USED])
    return Columns(store.begins[: chunks + 1], store.weights[:chunks], store.symbols[:used])


@njit
def _count(
    codes: Codes,
    ends: NDArray[np.int64],
    place: tuple[int, int],
    kinds: Classes,
    rule: Rule,
    frequent: Table,
    cut: int,
    store: Store,
) -> tuple[Store, tuple[int, int]]:
    """Count the chunks of the texts from a place on: the character, and the end of its segment.

    Leaves: (store, the place of the first piece for which there is no room).
    """
    at, stop = place
    paid = at  # up to here there is room
    for end in ends:
        while at < end:
            if at >= stop:
                stop = segment_end(codes, at, end, kinds, rule)
            piece = piece_end(codes, at, stop, kinds, rule)
            if piece > paid:
                paid = max(piece, min(at + _PAID, len(codes)))
                if not _has_room(store, paid - at):
                    paid = piece
                    if not _has_room(store, paid - at):
                        return store, (at, stop)
                store = _with_slots(store, paid - at)
            _cut(codes, at, piece, frequent, cut, 1, store)
            at = piece
    return store, (at, stop)


@njit
def _add_all(more: Columns, first: int, frequent: Table, cut: int, store: Store) -> tuple[Store, int]:
    """Cut the chunks from `first` on and add what comes of it: (store, the first one without room)."""
    for chunk in range(first, len(more.weights)):
        begin, end = more.begins[chunk], more.begins[chunk + 1] - 1
        if not _has_room(store, end - begin):
            return store, chunk
        store = _with_slots(store, end - begin)
        _cut(more.symbols, begin, end, frequent, cut, more.weights[chunk], store)
    return store, len(more.weights)


@njit
def _has_room(store: Store, characters: int) -> bool:
    """Whether the chunks of a text fit, even if each of its characters is a new one."""
    return len(store.symbols) - int(store.state[_USED]) > 2 * characters


@njit
def _with_slots(store: Store, characters: int) -> Store:
    """The store, with slots for the chunks of a text."""
    slots = store.slots
    while 3 * (store.state[_CHUNKS] + characters) >= 2 * len(slots):
        slots = _grown(slots)
    return Store(slots, store.begins, store.weights, store.symbols, store.state)


@njit
def _cut(codes: Text, start: int, end: int, frequent: Table, cut: int, weight: int, store: Store) -> None:
    """Add the chunks of a piece; where pieces are cut, those of one character are left out."""
    begin = start
    hashed = _follow(np.uint64(0), codes[start])
    for i in range(start + 1, end):
        if cut > 0:
            key = pair_key(codes[i - 1], codes[i])
            row = find(frequent, key)
            if frequent[row, 0] != key or frequent[row, 1] < cut:
                if i - begin > 1:
                    _add(codes, begin, i, hashed, weight, store)
                begin = i
                hashed = np.uint64(0)
        hashed = _follow(hashed, codes[i])
    if end - begin > 1 or cut == 0:
        _add(codes, begin, end, hashed, weight, store)


@njit
def _follow(hashed: np.uint64, code: int) -> np.uint64:
    return (hashed ^ np.uint64(code)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)


@njit
def _add(codes: Text, begin: int, end: int, hashed: np.uint64, weight: int, store: Store) -> None:
    """Count the chunk codes[begin:end]; the store has room for it."""
    slots, begins, weights, symbols, state = store
    tag = np.int64(spread(hashed) >> np.uint64(64 - _TAG))
    mask = len(slots) - 1
    at = tag & mask
    length = end - begin
    while slots[at] >= 0:
        if slots[at] >> 32 == tag:
            chunk = slots[at] & 0xFFFFFFFF
            old = begins[chunk]
            if begins[chunk + 1] - 1 - old == length:
                same = 0
                while same < length and symbols[old + same] == codes[begin + same]:
                    same += 1
                if same == length:
                    weights[chunk] += weight
                    return
        at = (at + 1) & mask
    chunk, used = state[_CHUNKS], state[_USED]
    slots[at] = (tag << 32) | chunk
    weights[chunk] = weight
    for i in range(length):
        symbols[used + i] = codes[begin + i]
    symbols[used + length] = SEPARATOR
    state[_USED] = used + length + 1
    state[_CHUNKS] = chunk + 1
    begins[chunk + 1] = used + length + 1


@njit
def _grown(slots: NDArray[np.int64]) -> NDArray[np.int64]:
    other = np.full(2 * len(slots), -1, dtype=np.int64)
    mask = len(other) - 1
    for slot in slots:
        if slot >= 0:
            at = (slot >> 32) & mask
            while other[at] >= 0:
                at = (at + 1) & mask
            other[at] = slot
    return other
