"""Preference sets → rows of pairs: both conversations of a pair lie in one row, each a segment of its own.

Enters: token sets whose sample 2k is chosen and 2k + 1 rejected. Leaves: batches whose `extras` hold the
reference's log-probabilities. Shapes: R rows, T tokens of context, P pairs of the fullest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microlm.text.shards import TokenSet
from microlm.train.batches.batch import Batch
from microlm.train.batches.lengths import Lengths
from microlm.train.batches.packing import Piece
from microlm.train.batches.rows import PackedRows, asked_for
from microlm.train.batches.spans import spans_of, unread

TooLongPair = Literal["drop", "cut_left"]
"""What becomes of a pair that no row can hold: it is left out, or both prompts lose their beginning."""
REFERENCE = "reference"


@dataclass(frozen=True)
class PairSet:
    """`tokens` with a pair as one sample, and where in it the rejected conversation of each begins.

    A pair of n tokens fills n - 1 positions; `lengths` tells what became of those that no row can hold.
    """

    tokens: TokenSet
    middles: NDArray[np.int64]
    lengths: Lengths

    def fitting(self, context: int) -> NDArray[np.int64]:
        """The numbers of the pairs that a row of `context` positions holds."""
        sizes = np.diff(np.asarray(self.tokens.ends), prepend=0) - 1
        return np.flatnonzero(sizes <= context)


def pairs_of(tokens: TokenSet, context: int, policy: TooLongPair) -> PairSet:
    """A preference set as pairs; with `cut_left` those too long lose as much of one prompt as of the other.

    At least a token of each prompt stays. What cannot fit all the same is left to be dropped.
    """
    borders = np.asarray(tokens.ends, dtype=np.int64).reshape(-1, 2)
    pairs = replace(tokens, ends=borders[:, 1])
    lengths = _counted(pairs, context)
    if policy == "drop" or not lengths.dropped:
        return PairSet(pairs, borders[:, 0], lengths)
    starts = np.column_stack((np.concatenate(([0], borders[:-1, 1])), borders[:, 0]))
    excess = borders[:, 1] - starts[:, 0] - 1 - context
    wanted = np.maximum(0, -(-excess // 2))
    lost = np.where(wanted < _prompt_sizes(tokens, starts).min(axis=1), wanted, 0)
    kept = np.ones(int(borders[-1, 1]), dtype=bool)
    for pair in np.flatnonzero(lost).tolist():
        for start in starts[pair].tolist():
            kept[start : start + lost[pair]] = False
    assert tokens.loss is not None
    ends = (borders.ravel() - np.repeat(lost, 2).cumsum()).reshape(-1, 2)
    shorter = TokenSet(tokens.name, np.asarray(tokens.tokens)[kept], tokens.loss[kept], ends[:, 1])
    after, cut = _counted(shorter, context), int((lost > 0).sum())
    told = replace(lengths, dropped=after.dropped, labels_lost=after.labels_lost, cut=cut, pieces=cut)
    gone = after.tokens_lost + 2 * int(lost.sum())
    return PairSet(shorter, ends[:, 0], replace(told, tokens_lost=gone))


def _counted(pairs: TokenSet, context: int) -> Lengths:
    return spans_of(pairs, context, unread(document_mask=True), "drop")[1]


def _prompt_sizes(tokens: TokenSet, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens before the first label of each conversation [pairs, 2]."""
    assert tokens.loss is not None
    labelled = np.append(np.flatnonzero(tokens.loss), len(tokens.loss))
    sizes: NDArray[np.int64] = labelled[np.searchsorted(labelled, starts)] - starts
    return sizes


class PairRows(PackedRows):
    """Packed rows of whole pairs: segment 2p of a row is the chosen side of its p-th pair, 2p + 1 the other.

    `references` [pairs, 2] by set, log-probabilities of the answers in nats: zero until somebody fills them.
    """

    def __init__(
        self,
        pairs: Mapping[str, PairSet],
        weights: Mapping[str, float],
        context: int,
        seed: int,
        too_long: TooLongPair,
    ) -> None:
        super().__init__({name: some.tokens for name, some in pairs.items()}, weights, context, seed)
        self.pairs = {name: pairs[name] for name in self.names}
        self.lengths, self.too_long = {name: some.lengths for name, some in self.pairs.items()}, too_long
        self.references = {name: torch.zeros(len(some.middles), 2) for name, some in self.pairs.items()}

    def assemble(self, rows: Sequence[Sequence[Piece]]) -> Batch:
        """The batch of whole pairs, its segments parted where the rejected sides begin."""
        batch = super().assemble(rows)
        references = torch.zeros(len(rows), max(map(len, rows)), 2)
        for r, pieces in enumerate(rows):
            at = 0
            for number, piece in enumerate(pieces):
                name = self.names[piece.group]
                middle = at + int(self.pairs[name].middles[piece.sample]) - piece.start
                batch.segments[r, at:middle] = 2 * number
                batch.segments[r, middle : at + piece.size] = 2 * number + 1
                references[r, number] = self.references[name][piece.sample]
                at += piece.size
        return replace(batch, extras={REFERENCE: references})

    def in_order(self) -> Iterator[list[Piece]]:
        """Rows that hold every pair that fits once, set by set, in their order."""
        row: list[Piece] = []
        room = self.context
        for group, some in enumerate(self.pairs.values()):
            ends = np.asarray(some.tokens.ends)
            for pair in some.fitting(self.context).tolist():
                start, end = int(ends[pair - 1]) if pair else 0, int(ends[pair])
                size = end - start - 1
                if size > room:
                    yield row
                    row, room = [], self.context
                row.append(Piece(group, pair, start, size, end))
                room -= size
        if row:
            yield row


def pair_rows(
    sets: Mapping[str, TokenSet],
    weights: Mapping[str, float],
    context: int,
    seed: int,
    too_long: TooLongPair = "drop",
) -> PairRows:
    """Rows of preference sets, in a seeded order, mixed by share of positions."""
    pairs = {name: pairs_of(tokens, context, too_long) for name, tokens in sets.items()}
    return PairRows(pairs, weights, context, seed, too_long)


def held_out_pairs(
    sets: Mapping[str, TokenSet], weights: Mapping[str, float], context: int, too_long: TooLongPair = "drop"
) -> PairRows | None:
    """Rows for validation, always the same, out of the sets that can be used; None when there are none.

    The shares of the others go to those; `left_out` tells which.
    """
    pairs = {name: pairs_of(tokens, context, too_long) for name, tokens in sets.items()}
    found = {name: some for name, some in pairs.items() if len(some.fitting(context))}
    shares = {name: weight for name, weight in weights.items() if name in found}
    if not found or (weights and not any(shares.values())):
        return None
    rows = PairRows(found, shares, context, 0, too_long)
    rows.left_out = {n: pairs[n].lengths for n in asked_for(pairs, weights) if n not in found}
    return rows


def pair_sums(values_RT: Tensor, segments_RT: Tensor, pairs: int) -> Tensor:
    """Sums [R,P,2] of values over both segments of each pair, always in one order of additions."""
    numbers = torch.arange(2 * pairs, device=segments_RT.device)
    within = segments_RT[:, None, :] == numbers[None, :, None]
    return torch.where(within, values_RT[:, None, :], 0).sum(dim=2).unflatten(1, (pairs, 2))
