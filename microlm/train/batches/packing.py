"""Which piece of which sample lies where: rows of T positions, one after the other, from a resumable place.

A sample of n tokens fills n-1 positions, each with the token after it as its label. Documents are cut where a
row ends and go on in the next one; spans of conversations stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from microlm.core import runtime
from microlm.train.batches.order import Order
from microlm.train.batches.spans import Spans, unread

LOOKAHEAD = 64  # conversations that wait for a row with room
BLOCK = 256  # spans whose borders are read at once


class Piece(NamedTuple):
    """`size` positions of a sample from token `start` of its set on; `end` is where its span ends."""

    group: int
    sample: int
    start: int
    size: int
    end: int


@dataclass(frozen=True)
class Mixture:
    """The spans of token sets and their shares of the positions; `whole` ones are not cut where a row ends.

    `joined` samples see those before them in a row.
    """

    names: Sequence[str]
    spans: Sequence[Spans]
    whole: Sequence[bool]
    shares: Sequence[float]
    context: int
    joined: bool

    @property
    def unread(self) -> int:
        """Tokens at a sample's end that fill no position."""
        return unread(document_mask=not self.joined)


class Packer:
    """Endless rows. `state()` is all that the next row depends on, besides seed and mixture."""

    def __init__(self, mixture: Mixture, seed: int, state: dict[str, Any] | None = None) -> None:
        self.mixture = mixture
        self._whole = mixture.whole
        self._lookahead = LOOKAHEAD if any(self._whole) else 1
        state, none = state or {}, [0] * len(mixture.spans)
        places = state.get("places") or [[0, 0] for _ in none]
        self._readers = [
            _Reader(mixture, number, seed, epoch, index) for number, (epoch, index) in enumerate(places)
        ]
        self._debts: list[float] = list(state.get("debts") or map(float, none))
        self._held = [Piece(*piece) for piece in state.get("held", [])]
        self._fill()
        self.rows, self.padding = state.get("rows", 0), state.get("padding", 0)
        self._taken: list[int] = list(state.get("taken") or none)

    def state(self) -> dict[str, Any]:
        """The place of the next row, as JSON values."""
        return {
            "rows": self.rows,
            "padding": self.padding,
            "taken": list(self._taken),
            "places": [[r.epoch, r.index] for r in self._readers],
            "debts": list(self._debts),
            "held": [list(piece) for piece in self._held],
        }

    def row(self) -> list[Piece]:
        """The pieces of the next row: who waits longest, conversations that fill the rest, else documents."""
        found: list[Piece] = []
        room = self._place(0, self.mixture.context, found)
        talks = [i for i, piece in enumerate(self._held) if self._whole[piece.group]]
        for i in best_sum([self._held[i].size for i in talks], room):
            room = self._place(talks[i], room, found)
        while room:
            texts = (i for i, piece in enumerate(self._held) if not self._whole[piece.group])
            first = next(texts, None)
            if first is None:
                break
            room = self._place(first, room, found)
        self.rows += 1
        self.padding += room
        return found

    def _place(self, number: int, room: int, row: list[Piece]) -> int:
        """Move a held piece into the row, as much of it as has room; returns the room that is left."""
        piece = self._held.pop(number)
        if piece.size > room:
            self._held.insert(0, piece._replace(start=piece.start + room, size=piece.size - room))
            piece = piece._replace(size=room)
        row.append(piece)
        self._taken[piece.group] += piece.size
        self._fill()
        return room - piece.size

    def _fill(self) -> None:
        """Hold enough samples, always of the set that lags most behind its share."""
        while len(self._held) < self._lookahead:
            debts = self._debts
            chosen = max(range(len(debts)), key=lambda i: debts[i])
            piece = self._readers[chosen].next()
            for i, share in enumerate(self.mixture.shares):
                debts[i] += share * piece.size
            debts[chosen] -= piece.size
            self._held.append(piece)


def best_sum(sizes: Sequence[int], room: int) -> list[int]:
    """Places, last first, of the sizes whose sum is closest to `room` from below; early ones if possible."""
    reach = [1]  # bit n: some of the first sizes add up to n
    within = (1 << room + 1) - 1
    for size in sizes:
        reach.append((reach[-1] | reach[-1] << size) & within)
        if reach[-1] >> room:
            break
    total, chosen = reach[-1].bit_length() - 1, []
    for i in range(len(reach) - 1, 0, -1):
        if not reach[i - 1] >> total & 1:
            chosen.append(i - 1)
            total -= sizes[i - 1]
    return chosen


class _Reader:
    """The usable spans of one set, in a new order each epoch."""

    def __init__(self, mixture: Mixture, number: int, seed: int, epoch: int, index: int) -> None:
        self.number, self.epoch, self.index = number, epoch, index
        self._mixture, self._seed = mixture, seed
        self._spans = mixture.spans[number]
        self._block: list[tuple[int, Piece]] = []  # (place in the order, span), last one first
        self._enter()

    def next(self) -> Piece:
        """The next span as a whole."""
        while not self._block:
            self._load()
        place, piece = self._block.pop()
        self.index = place + 1
        return piece

    def _enter(self) -> None:
        name = self._mixture.names[self.number]
        seed = runtime.derive_seed(self._seed, "order", name, self.epoch)
        self._order = Order(len(self._spans), seed)
        self._loaded = self.index

    def _load(self) -> None:
        if self._loaded >= self._order.count:
            self.epoch, self.index = self.epoch + 1, 0
            self._enter()
        numbers = self._order.take(self._loaded, self._loaded + BLOCK)
        found = zip(*(column.tolist() for column in self._spans.take(numbers)), strict=True)
        for place, (sample, start, end) in enumerate(found, self._loaded):
            if end - start > 1:
                size = end - start - self._mixture.unread
                self._block.append((place, Piece(self.number, sample, start, size, end)))
        self._block.reverse()
        self._loaded += len(numbers)
