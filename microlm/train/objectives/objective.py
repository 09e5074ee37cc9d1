"""The form of an objective. Shapes: R rows, T tokens of context, D hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from microlm.model.transformer import Decoder
from microlm.train.batches import Batch


class Loss(NamedTuple):
    """Sums over what some rows teach: the loss with its gradient, then one of each metric, detached."""

    total: Tensor
    sums: tuple[Tensor, ...] = ()


def label_count(batch: Batch) -> int:
    """Positions that carry loss."""
    return batch.label_count


@dataclass(frozen=True)
class Objective:
    """`loss(hidden [R,T,D], decoder, batch)`; sums over all ranks are divided by `count(batch)`.

    `metrics` names the sums: the loop logs their means, `validation_NAME` for those of held-out rows.
    `nll`: which of them is the labels' negative log-likelihood, of which bits per byte are told.
    """

    loss: Callable[[Tensor, Decoder, Batch], Loss]
    metrics: tuple[str, ...] = ()
    count: Callable[[Batch], int] = label_count
    nll: str | None = "loss"


def plain(total: Callable[[Tensor, Decoder, Batch], Tensor]) -> Objective:
    """An objective per label, without metrics, of a function that gives the summed loss."""
    return Objective(lambda hidden, decoder, batch: Loss(total(hidden, decoder, batch)))
