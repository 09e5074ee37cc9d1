"""Token sets → packed rows. The order depends on seed and row number only, so a position is one integer.

Shapes: R rows, T tokens of context. Labels are shifted here and nowhere else; -100 is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.core.recipe import nearest
from microlm.text.shards import TokenSet

IGNORE = -100
LOOKAHEAD = 64  # samples held back at most while a row is filled
MIN_GAP = 8  # tokens; a smaller rest of a row is padded


@dataclass(frozen=True)
class Batch:
    """`input_ids`, `labels`, `segments` (which sample of the row; -1 padding), each [R, T] int64."""

    input_ids: Tensor
    labels: Tensor
    segments: Tensor

    @property
    def label_count(self) -> int:
        """How many positions carry loss."""
        return int((self.labels != IGNORE).sum())

    def rows(self, start: int, stop: int) -> Batch:
        """A slice of rows."""
        return Batch(self.input_ids[start:stop], self.labels[start:stop], self.segments[start:stop])


@dataclass(frozen=True)
class _Piece:
    tokens: NDArray[np.int64]
    loss: NDArray[np.uint8] | None


class PackedRows:
    """An endless, seeded stream of packed rows out of several token sets, mixed by share of tokens."""

    def __init__(
        self, sets: Mapping[str, TokenSet], weights: Mapping[str, float], context: int, seed: int
    ) -> None:
        _check_weights(sets, weights)
        self.names = [n for n in sorted(sets) if weights.get(n, 0.0 if weights else 1.0) > 0]
        total = sum(weights.get(n, 1.0) for n in self.names)
        self.shares = [weights.get(n, 1.0) / total for n in self.names]
        self.context, self.seed = context, seed
        self.sets = [sets[n] for n in self.names]
        self.indices = [_usable(s, context) for s in self.sets]
        for tokens, index in zip(self.sets, self.indices, strict=True):
            if not len(index):
                longest = f"none of {len(tokens.ends)} samples fits into a row of {context} tokens"
                raise UserError(
                    f"{tokens.name}: {longest}; raise loop.context, or leave it out of the mixture"
                )
        sizes = zip(self.names, self.sets, self.indices, strict=True)
        self.dropped = {name: len(tokens.ends) - len(index) for name, tokens, index in sizes}

    def batches(self, rows: int, start: int = 0) -> Iterator[Batch]:
        """Batches of `rows` rows from batch number `start` on."""
        stream = self._rows()
        for _ in range(start * rows):
            next(stream)
        while True:
            filled = [next(stream) for _ in range(rows)]
            yield self._batch(filled)

    def _rows(self) -> Iterator[list[_Piece]]:
        samples = self._samples()
        held: list[_Piece] = []
        room_full = self.context + 1
        while True:
            row: list[_Piece] = []
            room = room_full
            while room > MIN_GAP:
                while len(held) < LOOKAHEAD:
                    held.extend(next(samples))
                position = next((i for i, p in enumerate(held) if len(p.tokens) <= room), None)
                if position is None:
                    break
                piece = held.pop(position)
                row.append(piece)
                room -= len(piece.tokens)
            yield row

    def _samples(self) -> Iterator[list[_Piece]]:
        """Samples in the mixture's order: always the set that lags most behind its share of tokens."""
        debts = [0.0] * len(self.names)
        orders = [self._order(i) for i in range(len(self.names))]
        while True:
            chosen = max(range(len(debts)), key=lambda i: debts[i])
            pieces = self._cut(self.sets[chosen], next(orders[chosen]))
            size = sum(len(p.tokens) for p in pieces)
            debts = [d + s * size for d, s in zip(debts, self.shares, strict=True)]
            debts[chosen] -= size
            yield pieces

    def _order(self, number: int) -> Iterator[int]:
        """Sample numbers of one set, in a new seeded order each epoch."""
        epoch = 0
        while True:
            seed = runtime.derive_seed(self.seed, "order", self.names[number], epoch)
            yield from map(int, np.random.default_rng(seed).permutation(self.indices[number]))
            epoch += 1

    def _cut(self, tokens: TokenSet, sample: int) -> list[_Piece]:
        start = int(tokens.ends[sample - 1]) if sample else 0
        ids = np.asarray(tokens.tokens[start : int(tokens.ends[sample])], dtype=np.int64)
        if tokens.loss is not None:
            return [_Piece(ids, tokens.loss[start : int(tokens.ends[sample])])]
        size = self.context + 1
        return [_Piece(ids[i : i + size], None) for i in range(0, len(ids), size - 1) if len(ids) - i > 1]

    def _batch(self, rows: list[list[_Piece]]) -> Batch:
        shape = (len(rows), self.context + 1)
        ids, segments = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        for r, pieces in enumerate(rows):
            at = 0
            for number, piece in enumerate(pieces):
                end = at + len(piece.tokens)
                ids[r, at:end] = piece.tokens
                segments[r, at:end] = number
                learnt = piece.tokens if piece.loss is None else np.where(piece.loss, piece.tokens, IGNORE)
                labels[r, at + 1 : end] = learnt[1:]
                at = end
        return Batch(
            torch.from_numpy(ids[:, :-1].copy()),
            torch.from_numpy(labels[:, 1:].copy()),
            torch.from_numpy(segments[:, :-1].copy()),
        )


def held_out_rows(
    sets: Mapping[str, TokenSet], weights: Mapping[str, float], context: int
) -> PackedRows | None:
    """Rows for validation, always the same, out of the sets that can be used; None when there are none."""
    found = {name: tokens for name, tokens in sets.items() if len(_usable(tokens, context))}
    shares = {name: weight for name, weight in weights.items() if name in found}
    if not found or (weights and not any(shares.values())):
        return None
    return PackedRows(found, shares, context, seed=0)


def _check_weights(sets: Mapping[str, TokenSet], weights: Mapping[str, float]) -> None:
    if not sets:
        raise UserError("shards: hold no token set of this kind; check the audit of the data stage")
    for name, weight in weights.items():
        if name not in sets:
            raise UserError(f"mixture: no token set '{name}'; {nearest(name, sets)}")
        if weight < 0:
            raise UserError(f"mixture: the share of '{name}' is {weight}; give 0 or more")
    if weights and not any(weights.values()):
        raise UserError("mixture: every share is 0; give at least one task a share of the tokens")


def _usable(tokens: TokenSet, context: int) -> NDArray[np.int64]:
    """Samples that can be used: conversations must fit into one row, documents are cut."""
    lengths = np.diff(tokens.ends, prepend=0)
    return np.flatnonzero(lengths <= context + 1 if tokens.loss is not None else lengths > 1)


def document_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [R,1,T,T]: 0 where a position may look (same sample, not later), else -inf."""
    size = segments.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    visible = (segments[:, :, None] == segments[:, None, :]) & causal
    blocked = torch.full((), float("-inf"), dtype=dtype, device=segments.device)
    return torch.where(visible, torch.zeros((), dtype=dtype, device=segments.device), blocked)[:, None]
