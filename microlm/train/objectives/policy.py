"""Clipped policy gradient over the tokens of answers, and what keeps the model near its start.

GRPO (2402.03300) without a critic: the advantage of an answer is that within its group. Shapes: R rows, T
tokens of context, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microlm.model.transformer import Decoder
from microlm.train.batches import Batch
from microlm.train.objectives.logprobs import label_logprobs
from microlm.train.objectives.objective import Loss, Objective

TOLD = ("clipped", "rollout_gap", "entropy")


@dataclass(frozen=True)
class Policy:
    """The loss of a batch's answers. Of `batch.extras`, each [R,T] and 0 where there is no label:

    `advantage`, `weight` (that the mean over answers is the one wanted), `engine` (log-probabilities of who
    drew the answers); `old` (of the weights that drew them; without it those of now), `raw` (the same at
    temperature 1) and `reference` (of the start) where they are needed; `told` [R,M] goes into the metrics.
    """

    clip: float
    kl_weight: float
    temperature: float

    def __call__(self, hidden_RTD: Tensor, decoder: Decoder, batch: Batch) -> Loss:
        extras, weight = batch.extras, batch.extras["weight"]
        new = tempered(hidden_RTD, decoder, batch, self.temperature)
        old = extras.get("old", new.detach())
        ratio, advantage = torch.exp(new - old), extras["advantage"]
        free, bounded = ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage
        raw = self._raw(hidden_RTD, decoder, batch, old)
        tokens = [free > bounded, (raw - extras["engine"]).abs(), -raw]
        loss = -torch.minimum(free, bounded)
        if self.kl_weight:
            apart = extras["reference"] - new
            kl = torch.exp(apart) - apart - 1  # k3 of joschu.net/blog/kl-approx.html: never negative
            loss, tokens = loss + self.kl_weight * kl, [*tokens, kl]
        sums = ((weight * t).sum().detach() for t in tokens)
        return Loss((weight * loss).sum(), (*extras["told"].sum(0).unbind(), *sums))

    def _raw(self, hidden_RTD: Tensor, decoder: Decoder, batch: Batch, old: Tensor) -> Tensor:
        """Log-probabilities at temperature 1 of the weights that drew the answers."""
        if self.temperature == 1:
            return old
        if "raw" in batch.extras:
            return batch.extras["raw"]
        with torch.no_grad():
            return label_logprobs(hidden_RTD, decoder, batch)


def tempered(hidden_RTD: Tensor, decoder: Decoder, batch: Batch, temperature: float) -> Tensor:
    """log p(label) [R,T] of the policy that draws at a temperature."""
    return label_logprobs(hidden_RTD / temperature if temperature != 1 else hidden_RTD, decoder, batch)


def make(policy: Policy, told: tuple[str, ...]) -> Objective:
    """The objective; `told` names the figures in `batch.extras["told"]`. Means are over answers."""
    names = (*told, *TOLD, "kl") if policy.kl_weight else (*told, *TOLD)
    return Objective(policy, names, answer_count, nll=None)


def answer_count(batch: Batch) -> int:
    """Answers in a batch's rows."""
    return sum(len(row) for row in batch.samples)
