"""Batches in their order, made ahead of time by threads; the place after the last one taken is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from microlm.train.batches.batch import Batch
from microlm.train.batches.packing import Packer, Piece

AHEAD = 2  # batches that each worker may have ready

Assemble = Callable[[Sequence[Sequence[Piece]]], Batch]
Plan = tuple[list[list[Piece]], dict[str, Any]]  # the pieces of each row, the place after them
Made = tuple[Batch, int, dict[str, Any]]  # a batch, its labels (counted by who made it), the place after it


class BatchStream:
    """An endless iterator. `workers` 0 makes each batch when it is asked for.

    `waited_s` and `labels` grow by the wait for each batch that is taken and by its labels. Rows are planned
    by one thread at a time, in their order, and filled side by side.
    """

    def __init__(self, packer: Packer, assemble: Assemble, rows: int, workers: int = 0) -> None:
        self.waited_s, self.labels = 0.0, 0
        self._packer, self._assemble, self._rows = packer, assemble, rows
        self._pins = torch.cuda.is_available()
        self._state = packer.state()
        self._planned = self._taken = 0
        self._ready: dict[int, Made] = {}
        self._planning, self._changed = threading.Lock(), threading.Condition()
        self._closed = False
        self._failure: Exception | None = None
        self._ahead = AHEAD * workers
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch, labels, self._state = self._take() if self._threads else self._make(self._plan())
        self.waited_s += time.perf_counter() - started
        self.labels += labels
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def watch(self, check: Callable[[], None]) -> None:
        """Rows that are read are there at once: nothing is given up."""

    def state(self) -> dict[str, Any]:
        """The place after the last batch that was taken, as JSON values, for `PackedRows.batches`."""
        return self._state

    def close(self) -> None:
        """End the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _plan(self) -> Plan:
        rows = [self._packer.row() for _ in range(self._rows)]
        return rows, self._packer.state()

    def _make(self, plan: Plan) -> Made:
        batch = self._assemble(plan[0])
        labels = batch.label_count
        return batch.pinned() if self._pins else batch, labels, plan[1]

    def _take(self) -> Made:
        """The next batch that a thread has made, or the error that ended one."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken in self._ready or self._failure is not None)
            if self._taken not in self._ready:
                assert self._failure is not None
                raise self._failure
            made = self._ready.pop(self._taken)
            self._taken += 1
            self._changed.notify_all()
        return made

    def _work(self) -> None:
        try:
            while numbered := self._next_plan():
                made = self._make(numbered[1])
                with self._changed:
                    self._ready[numbered[0]] = made
                    self._changed.notify_all()
        except Exception as e:  # the reader of the batches raises it
            with self._changed:
                self._failure = e
                self._changed.notify_all()

    def _next_plan(self) -> tuple[int, Plan] | None:
        """A batch to fill, once there is room for it; None when nobody reads any more."""
        with self._planning:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._planned < self._taken + self._ahead)
                if self._closed:
                    return None
            number, self._planned = self._planned, self._planned + 1
            return number, self._plan()
