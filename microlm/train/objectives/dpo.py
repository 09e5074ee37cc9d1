"""Direct preference optimisation (2305.18290): what is learnt from pairs, against fixed log-probabilities.

Shapes: R rows, T tokens of context, D hidden, P pairs of the fullest row; a last 2 is chosen, rejected.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from microlm.model.transformer import Decoder
from microlm.train.batches import IGNORE, Batch
from microlm.train.batches.pairs import REFERENCE, pair_sums
from microlm.train.objectives.logprobs import label_logprobs
from microlm.train.objectives.objective import Loss, Objective

METRICS = ("reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen", "logp_rejected")


def make(beta: float, label_smoothing: float = 0.0, nll_share: float = 0.0) -> Objective:
    """The objective of batches of pairs; sums are divided by the number of pairs."""
    loss = partial(dpo, beta=beta, label_smoothing=label_smoothing, nll_share=nll_share)
    return Objective(loss, METRICS, pair_count, nll=None)


def dpo(
    hidden_RTD: Tensor, decoder: Decoder, batch: Batch, beta: float, label_smoothing: float, nll_share: float
) -> Loss:
    """-log σ(β((π_c - ref_c) - (π_r - ref_r))) of each pair, π and ref the answers' log-probabilities.

    `label_smoothing`: how often the preference is taken to be the wrong way round (conservative DPO,
    Mitchell 2023). `nll_share` weighs the chosen answer's loss per label, added as in 2404.19733.
    """
    reference_RP2 = batch.extras[REFERENCE]
    logps_RP2 = pair_logps(hidden_RTD, decoder, batch)
    labels_RP2 = pair_labels(batch)
    real = (labels_RP2 > 0).all(dim=2)
    rewards_RP2 = beta * (logps_RP2 - reference_RP2)
    margin = rewards_RP2[..., 0] - rewards_RP2[..., 1]
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    if nll_share:
        losses = losses - nll_share * logps_RP2[..., 0] / labels_RP2[..., 0].clamp(min=1)
    right = (1 + margin.sign()) / 2  # a tie is half right: at the start there are many
    told = (*rewards_RP2.unbind(2), margin, right, *logps_RP2.unbind(2))
    sums = tuple(torch.where(real, values.detach(), 0.0).sum() for values in told)
    return Loss(torch.where(real, losses, 0.0).sum(), sums)


def pair_logps(hidden_RTD: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
    """Log-probabilities [R,P,2] of the answers."""
    pairs = batch.extras[REFERENCE].shape[1]
    return pair_sums(label_logprobs(hidden_RTD, decoder, batch), batch.segments, pairs)


def pair_labels(batch: Batch) -> Tensor:
    """Labels [R,P,2] of the answers; none where a row has fewer pairs."""
    labelled = (batch.labels != IGNORE).to(torch.int64)
    return pair_sums(labelled, batch.segments, batch.extras[REFERENCE].shape[1])


def pair_count(batch: Batch) -> int:
    """Pairs whose answers carry loss."""
    return int((pair_labels(batch) > 0).all(dim=2).sum())
