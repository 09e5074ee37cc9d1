"""Which way a step goes: the native kernel, a CUDA graph, or torch. Enters: a StepBatch; leaves: scores.

Native where rows are few: there reading the weights is the work, and torch's overhead is more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microlm.core.errors import UserError
from microlm.engine.cache.store import KVStore
from microlm.engine.forward import packed
from microlm.engine.forward.adapters import Adapters
from microlm.engine.forward.batch import StepBatch, single
from microlm.engine.forward.graphs import DecodeGraphs
from microlm.engine.forward.torch_path import TorchPath
from microlm.engine.native.step import NativeStep, why_not
from microlm.engine.native.weights import QuantizedLinear
from microlm.model.lora import adapted
from microlm.model.transformer import Decoder

CUT_OVER = {torch.float32: 64, torch.bfloat16: 48}
QUANTIZED_CUT_OVER, PACKED_CUT_OVER = 64, 32
"""Rows of a step up to which the native kernel is quicker than torch, which widens codes first (measured)."""
PRICE = {torch.float32: 0.2, torch.bfloat16: 0.2}
QUANTIZED_PRICE, TORCH_PRICE, CUDA_PRICE = 0.28, 0.15, 0.05
"""Of a drafted token, in steps of one row (measured; on CUDA assumed)."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What the runner may use. `invariant`: one kernel and one order of sums, whatever the step holds.

    `own`: nobody else uses the decoder, so that its weights may be laid out anew.
    """

    native: bool = True
    invariant: bool = False
    threads: int = 1
    own: bool = False


class Runner:
    """Forward passes of one decoder over one store."""

    def __init__(self, decoder: Decoder, store: KVStore, ways: Ways, table: int) -> None:
        on_cpu = store.k.device.type == "cpu"
        if ways.invariant and not on_cpu:
            raise UserError(
                "batch_invariant: is for the CPU; torch's CUDA kernels sum in an order that depends on the "
                "batch: leave it out, or run on the CPU"
            )
        self.decoder, self.store = decoder, store
        self.adapters = Adapters(decoder)
        self.torch = TorchPath(decoder, store, self.adapters)
        self._invariant = ways.invariant
        self._is_quantized = isinstance(decoder.lm_head, QuantizedLinear)
        self._cut_over = QUANTIZED_CUT_OVER if self._is_quantized else CUT_OVER[decoder.compute_dtype]
        native = ways.native and not adapted(decoder) and why_not(decoder) is None
        self.native = NativeStep(decoder, store, ways.threads, own=ways.own) if native else None
        self._graphs = DecodeGraphs(self.torch, table) if store.k.device.type == "cuda" else None

    @property
    def draft_rows(self) -> int:
        """Rows of a step up to which drafts are given."""
        return NativeStep.MAX_ROWS if self.store.k.device.type == "cpu" else 64

    @property
    def draft_price(self) -> float:
        """What one more row of a small step costs, in steps of one row."""
        if self._graphs is not None:
            return CUDA_PRICE
        if self.native is None:
            return TORCH_PRICE
        return QUANTIZED_PRICE if self._is_quantized else PRICE[self.decoder.compute_dtype]

    def pack(self) -> None:
        """Copy the matrices into the order that torch multiplies quickest with, if it gains by it."""
        if not self._is_quantized and packed.can_pack(self.decoder):
            packed.pack(self.decoder)
            self._cut_over = PACKED_CUT_OVER

    def refresh(self) -> None:
        """Take over weights that were changed in place: what was copied from them is copied again."""
        if self.native is not None:
            self.native.refresh()
        packed.refresh(self.decoder)

    def warm(self, tell: Callable[[str], None]) -> None:
        """Compile the native kernel now rather than at the first step; `tell` hears of it."""
        if self.native is not None:
            self.native.warm(tell)

    def forward(self, batch: StepBatch) -> Tensor:
        """Scores [W,V] in float32 of the wanted rows, in the order in which the spans were given."""
        if self._invariant:
            return self._in_rows(batch)
        if self.native is not None and len(batch.tokens) <= self._cut_over and not batch.has_adapters:
            return self.native.run(batch.tokens, batch.positions, batch.row_tables(), batch.wanted)
        if self._graphs is not None and self._graphs.takes(batch):
            return self._graphs.run(batch)
        return self.torch.forward(batch)

    def _in_rows(self, batch: StepBatch) -> Tensor:
        """By a kernel whose sums depend on a row's position alone: the native one, or torch row by row."""
        counts = [len(span.tokens) for span in batch.spans]
        plain = np.repeat([self.native is not None and s.adapter is None for s in batch.spans], counts)
        mine = plain[batch.wanted]
        scores = torch.empty(len(mine), self.decoder.config.vocab_size)
        if self.native is not None and plain.any():
            rows = np.flatnonzero(plain)
            wanted = np.searchsorted(rows, batch.wanted[mine])
            tables = batch.row_tables()[rows]
            found = self.native.run(batch.tokens[rows], batch.positions[rows], tables, wanted)
            scores[torch.from_numpy(mine)] = found
        places = {row: i for i, row in enumerate(batch.wanted.tolist())}
        for span, first in zip(batch.spans, batch.firsts, strict=True):
            for row, token in enumerate(span.tokens if not plain[first] else (), first):
                alone = single(span, token, span.start + row - first, wanted=row in places)
                found = self.torch.forward(alone)
                if row in places:
                    scores[places[row]] = found[0]
        return scores
