"""A step through torch: flat tokens through the decoder, attention over gathered pages.

Shapes: T tokens, H heads, K key-value heads, d head size, n rows of a group, m their pages, L = m · PAGE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from microlm.engine.cache.pages import pages_for
from microlm.engine.cache.store import PAGE, KVStore
from microlm.engine.forward.adapters import Adapters
from microlm.engine.forward.batch import Span, StepBatch
from microlm.model.attention import varlen_attention
from microlm.model.transformer import Decoder, masked_attention

WASTE = 2.0  # a group of rows is gathered to its longest: at most so many times what the rows hold


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows first … stop-1, one token each, that are attended together over the first `used` keys."""

    first: int
    stop: int
    heads: Tensor
    used: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows first … stop-1 of one sequence; `heads` is None where they see nothing but themselves."""

    first: int
    stop: int
    heads: Tensor | None
    used: int
    mask: Tensor | None


@dataclass(slots=True)
class Plan:
    """Where a step's keys and values go (`places` [T·K]), and what attends to what."""

    places: Tensor
    rows: list[Rows] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    borders: Tensor | None = None  # of fresh sequences that lie end to end from `fresh` on
    fresh: int = 0


class TorchPath:
    """Forward passes of one decoder over one store; any device, any precision."""

    def __init__(self, decoder: Decoder, store: KVStore, adapters: Adapters) -> None:
        self.decoder, self.store, self.adapters = decoder, store, adapters
        self.device = store.k.device
        self._flash = self.device.type == "cuda" and store.precision == torch.bfloat16

    def forward(self, batch: StepBatch) -> Tensor:
        """Scores [W,V] in float32 of the wanted rows, in the order in which the spans were given."""
        stops = [*batch.firsts[1:], len(batch.tokens)]
        spans = zip(batch.spans, batch.firsts, stops, strict=True)
        self.adapters.use((span.adapter, first, stop) for span, first, stop in spans)
        try:
            tokens, positions = self._put(batch.tokens), self._put(batch.positions)
            hidden = self.run(tokens, positions, self._plan(batch, stops))
        finally:
            self.adapters.use(())
        if len(batch.wanted) < len(batch.tokens) or len(batch.spans) > 1:
            hidden = hidden[self._put(batch.wanted)]
        return self.decoder.logits(hidden)

    def run(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        """Hidden states [T,D] of `tokens` [T] at `positions` [T]; keys and values are stored."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.store.write(layer, plan.places, k[0].transpose(0, 1), v[0].transpose(0, 1))
            parts = [self._attend_rows(layer, q, rows) for rows in plan.rows]
            parts += [self._attend_piece(layer, q, k, v, piece) for piece in plan.pieces]
            if plan.borders is not None:
                fresh = slice(plan.fresh, None)
                parts.append(varlen_attention(q[:, :, fresh], k[:, :, fresh], v[:, :, fresh], plan.borders))
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

        return self.decoder.hidden(tokens[None], positions, attend)[0]

    def rows_plan(self, positions: Tensor, tables: Tensor) -> Plan:
        """The plan of single rows at `positions` [n] of `tables` [n,m], computed where they lie."""
        rows = Rows(
            0, len(positions), self._heads(tables), tables.shape[1] * PAGE, self._mask(positions, tables)
        )
        return Plan(self._places(positions, tables), [rows])

    def _attend_rows(self, layer: int, q: Tensor, rows: Rows) -> Tensor:
        """One token each. Heads that share a key-value head stand as its query rows: nothing is repeated."""
        n, (H, d) = rows.stop - rows.first, (q.shape[1], q.shape[3])
        keys, values = self.store.gather(layer, rows.heads, n)
        if rows.mask is None:
            keys, values = keys[:, :, : rows.used], values[:, :, : rows.used]
        grouped = q[0, :, rows.first : rows.stop].transpose(0, 1).reshape(n, self.store.heads, -1, d)
        y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=rows.mask)
        return y.reshape(1, n, H, d).transpose(1, 2)

    def _attend_piece(self, layer: int, q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> Tensor:
        """Some tokens of one sequence. Codes are read back, so that these rows see what later rows will."""
        own = slice(piece.first, piece.stop)
        if piece.heads is None:
            return masked_attention(q[:, :, own], k[:, :, own], v[:, :, own], None)
        keys, values = self.store.gather(layer, piece.heads, 1)
        return masked_attention(
            q[:, :, own], keys[:, :, : piece.used], values[:, :, : piece.used], piece.mask
        )

    def _plan(self, batch: StepBatch, stops: list[int]) -> Plan:
        row_tables = self._put(batch.row_tables())
        plan = Plan(self._places(self._put(batch.positions), row_tables))
        plan.rows = list(self._row_groups(batch, row_tables))
        for i in range(batch.singles, len(batch.spans)):
            span, first = batch.spans[i], batch.firsts[i]
            if self._flash and self.store.dtype == "auto" and span.start == 0:
                plan.fresh = first
                borders = np.array([*batch.firsts[i:], stops[-1]], dtype=np.int32) - first
                plan.borders = self._put(borders)
                break
            plan.pieces.append(self._piece(span, first, stops[i]))
        return plan

    def _row_groups(self, batch: StepBatch, tables: Tensor) -> Iterator[Rows]:
        """Single rows (they lie by length) in groups that waste little."""
        first, stop = 0, batch.singles
        while first < stop:
            last, held = first, 0
            while last < stop:
                pages = pages_for(int(batch.positions[last]) + 1)
                if pages * (last + 1 - first) > WASTE * (held + pages):
                    break
                held, last = held + pages, last + 1
            used = int(batch.positions[last - 1]) + 1
            mine = tables[first:last, : pages_for(used)]
            positions = self._put(batch.positions[first:last])
            mask = None if last - first == 1 else self._mask(positions, mine)
            yield Rows(first, last, self._heads(mine), used, mask)
            first = last

    def _piece(self, span: Span, first: int, stop: int) -> Piece:
        used = span.start + stop - first
        if span.start == 0 and self.store.dtype == "auto":
            return Piece(first, stop, None, used, None)
        heads = self._heads(self._put(span.table[None, : pages_for(used)]))
        if span.start == 0:
            return Piece(first, stop, heads, used, None)
        at = torch.arange(span.start, used, device=self.device)
        mask = torch.arange(used, device=self.device) <= at[:, None]
        return Piece(first, stop, heads, used, mask)

    def _places(self, positions: Tensor, tables: Tensor) -> Tensor:
        """Where the tokens go, [T·K]: (page · K + head) · PAGE + offset."""
        pages = tables.gather(1, (positions // PAGE)[:, None]).long()
        places = (pages * self.store.heads + self._kv_heads()) * PAGE + (positions % PAGE)[:, None]
        return places.flatten()

    def _heads(self, tables: Tensor) -> Tensor:
        """What `KVStore.gather` reads for tables [n,m], [n·K·m]."""
        return (tables[:, None].long() * self.store.heads + self._kv_heads()[:, None]).flatten()

    def _kv_heads(self) -> Tensor:
        return torch.arange(self.store.heads, device=self.device)

    def _mask(self, positions: Tensor, tables: Tensor) -> Tensor:
        """0 where row i may look, -inf beyond its own position, [n,1,1,L]."""
        beyond = torch.arange(tables.shape[1] * PAGE, device=self.device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=self.store.precision, device=self.device)
        return mask.masked_fill_(beyond, float("-inf"))[:, None, None]

    def _put(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
