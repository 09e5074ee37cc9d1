"""What a step learns from. Shapes: R rows, T tokens of context. Labels come shifted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

IGNORE = -100
NO_TRUNK = -2
Sample = tuple[str, int]
"""A token set's name, and the number of a sample in it."""


@dataclass(frozen=True)
class Batch:
    """`input_ids`, `labels`, `segments` (who may see whom in a row; -1 padding), each [R, T] int64.

    `samples` names what lies in each row, from left to right. `extras`: more that an objective needs, [R, …];
    where segments go on from a beginning that they share, `trunk` (its segment; NO_TRUNK) and `positions`.
    """

    input_ids: Tensor
    labels: Tensor
    segments: Tensor
    samples: tuple[tuple[Sample, ...], ...] = ()
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def label_count(self) -> int:
        """How many positions carry loss."""
        return int((self.labels != IGNORE).sum())

    @cached_property
    def positions(self) -> Tensor:
        """Positions [R, T] for the rotary tables: each segment counts from 0, or goes on from its trunk."""
        if "positions" in self.extras:
            return self.extras["positions"]
        index = torch.arange(self.segments.shape[1], device=self.segments.device).expand_as(self.segments)
        begins = torch.ones_like(self.segments, dtype=torch.bool)
        begins[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return index - torch.where(begins, index, 0).cummax(dim=1).values

    def rows(self, start: int, stop: int) -> Batch:
        """A slice of rows."""
        return self._with(lambda t: t[start:stop], self.samples[start:stop])

    def labelled(self, rows: int) -> Batch:
        """The same shape, with the labels of the first `rows` rows only."""
        if rows >= len(self.labels):
            return self
        labels = self.labels.clone()
        labels[rows:] = IGNORE
        return replace(self, labels=labels)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; from pinned memory the copy runs beside what the device does."""
        if self.input_ids.device == device:
            return self
        return self._same(lambda t: t.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU can fetch by itself."""
        return self._same(Tensor.pin_memory)

    def _same(self, change: Callable[[Tensor], Tensor]) -> Batch:
        moved = self._with(change, self.samples)
        moved.__dict__["label_count"] = self.label_count  # counted here, so that nobody waits for the device
        return moved

    def _with(self, change: Callable[[Tensor], Tensor], samples: tuple[tuple[Sample, ...], ...]) -> Batch:
        extras = {name: change(extra) for name, extra in self.extras.items()}
        return Batch(change(self.input_ids), change(self.labels), change(self.segments), samples, extras)


def document_mask(segments: Tensor, dtype: torch.dtype, trunks: Tensor | None = None) -> Tensor:
    """Additive attention mask [R,1,T,T]: 0 where a position may look, else -inf.

    It may look at its own segment and at its trunk [R,T], not later.
    """
    size = segments.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    visible = segments[:, :, None] == segments[:, None, :]
    if trunks is not None:
        visible |= trunks[:, :, None] == segments[:, None, :]
    visible &= causal
    blocked = torch.full((), float("-inf"), dtype=dtype, device=segments.device)
    return torch.where(visible, torch.zeros((), dtype=dtype, device=segments.device), blocked)[:, None]
