"""Token sets and a mixture → batches of packed rows. Labels are shifted here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from microlm.core.errors import UserError
from microlm.core.recipe import nearest
from microlm.text.shards import TokenSet
from microlm.train.batches.batch import IGNORE, Batch
from microlm.train.batches.lengths import Lengths
from microlm.train.batches.packing import Mixture, Packer, Piece
from microlm.train.batches.spans import TooLong, spans_of, unread
from microlm.train.batches.stream import BatchStream


class PackedRows:
    """Packed rows out of several token sets, mixed by share of positions; endless, in a seeded order.

    With `document_mask` each sample sees itself only; without it also the samples before it in its row.
    `lengths` tells of each set what is trained on, and what `too_long` left out; `left_out` of the sets of
    which no sample fits, where that is allowed.
    """

    def __init__(
        self,
        sets: Mapping[str, TokenSet],
        weights: Mapping[str, float],
        context: int,
        seed: int,
        document_mask: bool = True,
        too_long: TooLong = "drop",
    ) -> None:
        _check_weights(sets, weights)
        self.names = asked_for(sets, weights)
        total = sum(weights.get(n, 1.0) for n in self.names)
        self.shares = [weights.get(n, 1.0) / total for n in self.names]
        self.context, self.seed, self.too_long = context, seed, too_long
        chosen = [sets[n] for n in self.names]
        found = [spans_of(s, context, unread(document_mask), too_long) for s in chosen]
        self.lengths = {n: lengths for n, (_, lengths) in zip(self.names, found, strict=True)}
        self.left_out: dict[str, Lengths] = {}
        for name, lengths in self.lengths.items():
            _require_some(sets[name].name, lengths, context)
        spans, whole = [spans for spans, _ in found], [s.loss is not None for s in chosen]
        self._mixture = Mixture(self.names, spans, whole, self.shares, context, not document_mask)
        self._tokens = [np.asarray(s.tokens) for s in chosen]  # views: a slice of a memmap costs far more
        self._loss = [None if s.loss is None else np.asarray(s.loss) for s in chosen]

    def batches(self, rows: int, state: dict[str, Any] | None = None, workers: int = 0) -> BatchStream:
        """Batches of `rows` rows, from the beginning or from a stream's `state()`; close it after use."""
        return BatchStream(Packer(self._mixture, self.seed, state), self.assemble, rows, workers)

    def told(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Epochs and share of each set up to a stream's `state()`; the counts of its samples."""
        return {
            "epochs": {name: round(times, 4) for name, times in self.epochs(state).items()},
            "shares": {name: round(share, 4) for name, share in self.realised(state).items()},
            "lengths": {name: asdict(found) for name, found in self.lengths.items()},
        }

    def epochs(self, state: Mapping[str, Any]) -> dict[str, float]:
        """How often each set has been read up to a stream's `state()`."""
        places = zip(self.names, state["places"], self._mixture.spans, strict=True)
        return {name: epoch + index / len(spans) for name, (epoch, index), spans in places}

    def realised(self, state: Mapping[str, Any]) -> dict[str, float]:
        """The share of the positions, padding apart, that each set has had up to a stream's `state()`."""
        total = max(1, sum(state["taken"]))
        return {name: taken / total for name, taken in zip(self.names, state["taken"], strict=True)}

    def assemble(self, rows: Sequence[Sequence[Piece]]) -> Batch:
        """Fill the tensors of a batch; whoever plans it says what lies where."""
        shape = (len(rows), self.context)
        ids, segments = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        for r, pieces in enumerate(rows):
            at = 0
            for number, piece in enumerate(pieces):
                here = slice(at, at + piece.size)
                ids[r, here] = self._tokens[piece.group][piece.start : piece.start + piece.size]
                segments[r, here] = 0 if self._mixture.joined else number
                self._fill_labels(labels[r, here], piece)
                at += piece.size
        samples = tuple(tuple((self.names[p.group], p.sample) for p in pieces) for pieces in rows)
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(segments), samples)

    def _fill_labels(self, labels: NDArray[np.int64], piece: Piece) -> None:
        """The tokens after those of a piece, as far as they are its sample's and may be learnt."""
        stop = min(piece.start + piece.size + 1, piece.end)
        following = slice(piece.start + 1, stop)
        labels = labels[: stop - piece.start - 1]
        labels[:] = self._tokens[piece.group][following]
        loss = self._loss[piece.group]
        if loss is not None:
            labels[loss[following] == 0] = IGNORE


def held_out_rows(
    sets: Mapping[str, TokenSet],
    weights: Mapping[str, float],
    context: int,
    document_mask: bool = True,
    too_long: TooLong = "drop",
) -> PackedRows | None:
    """Rows for validation, always the same, out of the sets that can be used; None when there are none.

    The shares of the others go to those; `left_out` tells which.
    """
    lengths = {n: spans_of(s, context, unread(document_mask), too_long)[1] for n, s in sets.items()}
    found = {name: tokens for name, tokens in sets.items() if lengths[name].used}
    shares = {name: weight for name, weight in weights.items() if name in found}
    if not found or (weights and not any(shares.values())):
        return None
    rows = PackedRows(found, shares, context, 0, document_mask, too_long)
    rows.left_out = {n: lengths[n] for n in asked_for(sets, weights) if n not in found}
    return rows


def asked_for(sets: Iterable[str], weights: Mapping[str, float]) -> list[str]:
    """The sets with a share; without weights each has one."""
    return [name for name in sorted(sets) if weights.get(name, 0.0 if weights else 1.0) > 0]


def _require_some(name: str, lengths: Lengths, context: int) -> None:
    if lengths.used:
        return
    if lengths.dropped:
        raise UserError(
            f"{name}: none of {lengths.samples} samples fits into a row of {context} tokens; "
            "raise loop.context, choose another too_long, or leave it out of the mixture"
        )
    raise UserError(
        f"{name}: none of {lengths.samples} samples holds anything to learn; leave it out of the mixture"
    )


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
