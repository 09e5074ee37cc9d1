"""White-box distillation (1503.02531): the labels, and the whole distribution of a teacher beside each.

Shapes: R rows, T tokens of context, D hidden, E the teacher's hidden, N positions with a label, V vocabulary,
U the teacher's. Logits of either exist in chunks only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from microlm.model.transformer import Decoder
from microlm.train.batches import Batch
from microlm.train.objectives.cross_entropy import chunked_head, labelled_positions, wide
from microlm.train.objectives.objective import Loss, Objective

METRICS = ("ce", "kl", "agreement")
Found = tuple[Tensor, Tensor, Tensor]
"""Of some positions: the summed loss; sums [3] of the metrics; the loss's gradient [N,V] by the logits."""


@dataclass(frozen=True)
class Mix:
    """The loss (1 - alpha) · CE(labels) + alpha · T² · KL(teacher ‖ student), both distributions at T.

    `top_k`: the teacher's likeliest so many tokens alone, their probabilities scaled to one; 0: all.
    """

    alpha: float
    temperature: float
    top_k: int = 0


@dataclass(frozen=True)
class Teacher:
    """Who is learnt from: normed hidden states [R,T,E] of a batch, and the head [U,E] on them."""

    hidden: Callable[[Batch], Tensor]
    head: Tensor


def make(teacher: Teacher, mix: Mix, compiled: bool) -> Objective:
    """The objective per label, its kernel compiled or not."""
    kernel = _compiled_kernel() if compiled else compare

    def loss(hidden_RTD: Tensor, decoder: Decoder, batch: Batch) -> Loss:
        with torch.no_grad():
            taught_NE = teacher.hidden(batch).flatten(0, 1)
        hidden_ND, labels = hidden_RTD.flatten(0, 1), batch.labels.flatten()
        positions = labelled_positions(batch)
        if positions is not None:
            taught_NE, labels = taught_NE[positions], labels[positions]
        head = teacher.head.to(taught_NE.dtype)
        told = torch.zeros(len(METRICS), dtype=wide(hidden_ND.dtype), device=hidden_ND.device)

        def add(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            total, sums, gradient = kernel(logits, taught_NE[part] @ head.mT, labels[part], mix)
            told.add_(sums)
            return total, gradient

        return Loss(chunked_head(hidden_ND, decoder, positions, add), tuple(told.unbind()))

    return Objective(loss, METRICS, nll="ce")


def compare(logits_NV: Tensor, taught_NU: Tensor, labels: Tensor, mix: Mix) -> Found:
    """In float32, whatever the logits come in; what is no label counts for nothing.

    The models' tables may end in rows that stand for no token: the student's are learnt to be unlikely.
    """
    x_NV, known = logits_NV.to(wide(logits_NV.dtype)), labels >= 0
    sums = torch.logsumexp(x_NV, dim=1, keepdim=True)
    picked = labels.clamp(min=0)[:, None]
    ce = torch.where(known, (sums - x_NV.gather(1, picked))[:, 0], 0.0).sum()
    own = torch.exp(x_NV - sums) - (torch.arange(x_NV.shape[1], device=x_NV.device) == picked).to(x_NV.dtype)
    t_NV = _aligned(taught_NU.to(x_NV.dtype), x_NV.shape[1])
    agreed = torch.where(known, t_NV.argmax(dim=1) == x_NV.argmax(dim=1), False).sum()
    log_p = torch.log_softmax(_likeliest(t_NV, mix.top_k) / mix.temperature, dim=1)
    log_q = torch.log_softmax(x_NV / mix.temperature, dim=1)
    p = torch.exp(log_p)
    kl = torch.where(known[:, None] & (p > 0), p * (log_p - log_q), 0.0).sum()
    both = (1 - mix.alpha) * own + mix.alpha * mix.temperature * (torch.exp(log_q) - p)
    gradient = torch.where(known[:, None], both, 0.0).to(logits_NV.dtype)
    total = (1 - mix.alpha) * ce + mix.alpha * mix.temperature**2 * kl
    return total, torch.stack([ce, kl, agreed.to(ce.dtype)]), gradient


def _aligned(logits_NU: Tensor, size: int) -> Tensor:
    """The teacher's logits as wide as the student's: more are cut off, missing ones are impossible."""
    found: Tensor = F.pad(logits_NU[:, :size], (0, max(0, size - logits_NU.shape[1])), value=float("-inf"))
    return found


def _likeliest(logits_NV: Tensor, count: int) -> Tensor:
    """The largest `count` logits of each position, the others impossible; 0: all of them."""
    if not 0 < count < logits_NV.shape[1]:
        return logits_NV
    values, places = logits_NV.topk(count, dim=1)
    return torch.full_like(logits_NV, float("-inf")).scatter(1, places, values)


@cache
def _compiled_kernel() -> Callable[[Tensor, Tensor, Tensor, Mix], Found]:
    return torch.compile(compare, dynamic=False)
