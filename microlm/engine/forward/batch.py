"""What one step computes, flat: tokens of all requests one after another, single rows first.

Shapes: T tokens, S spans (one for each request), m pages of the longest table, W wanted rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microlm.engine.cache.pages import pages_for
from microlm.engine.forward.adapters import Adapter

IntArray = NDArray[np.int64]


class Span(NamedTuple):
    """Tokens of one sequence at positions start, start + 1, …; of the last `wanted` scores are asked for."""

    tokens: Sequence[int]
    start: int
    table: NDArray[np.int32]
    wanted: int
    adapter: Adapter | None = None


@dataclass(slots=True)
class StepBatch:
    """Spans in the order of computing: single rows by length, then spans with a past, then fresh ones.

    `tokens`, `positions` [T]; `tables` [S,m]; `wanted` [W], in the order in which the spans were given.
    """

    spans: list[Span]
    firsts: list[int]
    tokens: IntArray
    positions: IntArray
    tables: NDArray[np.int32]
    wanted: IntArray

    @property
    def singles(self) -> int:
        """How many spans at the beginning are of one token."""
        return next((i for i, s in enumerate(self.spans) if len(s.tokens) > 1), len(self.spans))

    @property
    def has_adapters(self) -> bool:
        """Whether a span asks for one."""
        return any(s.adapter is not None for s in self.spans)

    def row_tables(self) -> NDArray[np.int32]:
        """The table of each token, [T,m]."""
        if len(self.spans) == len(self.tokens):
            return self.tables
        return np.repeat(self.tables, [len(s.tokens) for s in self.spans], axis=0)


def batch_of(spans: Sequence[Span]) -> StepBatch:
    """The batch of some sequences' next tokens."""
    if len(spans) == 1:
        return _of_one(spans[0])
    order = sorted(range(len(spans)), key=lambda i: _kind(spans[i]))
    ordered = [spans[i] for i in order]
    firsts: list[int] = []
    tokens: list[int] = []
    positions: list[int] = []
    for span in ordered:
        firsts.append(len(tokens))
        tokens += span.tokens
        positions += range(span.start, span.start + len(span.tokens))
    pages = max(pages_for(s.start + len(s.tokens)) for s in ordered)
    tables = np.stack([s.table[:pages] for s in ordered])
    wanted: list[int] = []
    place = {given: at for at, given in enumerate(order)}
    for given, span in enumerate(spans):
        stop = firsts[place[given]] + len(span.tokens)
        wanted += range(stop - span.wanted, stop)
    return StepBatch(ordered, firsts, _ints(tokens), _ints(positions), tables, _ints(wanted))


def _ints(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


def single(span: Span, token: int, position: int, wanted: bool) -> StepBatch:
    """One token of a span as a batch of its own."""
    return _of_one(Span([token], position, span.table, int(wanted), span.adapter))


def _of_one(span: Span) -> StepBatch:
    count = len(span.tokens)
    stop = span.start + count
    return StepBatch(
        [span],
        [0],
        np.array(span.tokens, dtype=np.int64),
        np.arange(span.start, stop),
        span.table[None, : pages_for(stop)],
        np.arange(count - span.wanted, count),
    )


def _kind(span: Span) -> tuple[int, int]:
    """Single rows by length, then spans with a past, then fresh ones."""
    if len(span.tokens) == 1:
        return 0, span.start
    return (1, 0) if span.start else (2, 0)
