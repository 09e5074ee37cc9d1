"""CUDA graphs of decoding steps: one launch for all kernels of a step. One graph for each size of step.

A size is a number of rows and of pages, both rounded up to a power of two; rows beyond the real ones write to
page 0 and are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microlm.engine.forward.batch import StepBatch
from microlm.engine.forward.torch_path import TorchPath

MOST_ROWS = 256  # larger steps keep the GPU busy without a graph


class DecodeGraphs:
    """Captured steps of single rows; captured when a size is first met."""

    def __init__(self, path: TorchPath, table: int) -> None:
        self._path = path
        device = path.device
        pages = 1 << (table - 1).bit_length()
        self._tokens = torch.zeros(MOST_ROWS, dtype=torch.int64, device=device)
        self._positions = torch.zeros(MOST_ROWS, dtype=torch.int64, device=device)
        self._tables = torch.zeros(MOST_ROWS, pages, dtype=torch.int32, device=device)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def takes(self, batch: StepBatch) -> bool:
        """Whether a step is of single rows, without adapters and not too large."""
        rows = len(batch.tokens)
        return len(batch.spans) == rows == len(batch.wanted) <= MOST_ROWS and not batch.has_adapters

    def run(self, batch: StepBatch) -> Tensor:
        """Scores [W,V] of such a step."""
        count, used = batch.tables.shape
        rows, pages = 1 << (count - 1).bit_length(), 1 << (used - 1).bit_length()
        self._positions[:rows].zero_()
        self._tables[:rows, :pages].zero_()
        self._tokens[:count].copy_(torch.from_numpy(batch.tokens))
        self._positions[:count].copy_(torch.from_numpy(batch.positions))
        self._tables[:count, :used].copy_(torch.from_numpy(batch.tables.copy()))
        graph, scores = self._graphs.get((rows, pages)) or self._capture(rows, pages)
        graph.replay()
        return scores[torch.from_numpy(batch.wanted).to(scores.device)]

    def _capture(self, rows: int, pages: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at first use must not be captured
            self._step(rows, pages)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            scores = self._step(rows, pages)
        self._graphs[rows, pages] = graph, scores
        return graph, scores

    def _step(self, rows: int, pages: int) -> Tensor:
        positions = self._positions[:rows]
        plan = self._path.rows_plan(positions, self._tables[:rows, :pages])
        return self._path.decoder.logits(self._path.run(self._tokens[:rows], positions, plan))
