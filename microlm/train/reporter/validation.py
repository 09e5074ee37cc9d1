"""The loss on held-out rows, per label and per byte of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from microlm.model.transformer import Decoder
from microlm.text.tokenizer import Tokenizer
from microlm.train.batches import IGNORE
from microlm.train.job import Job
from microlm.train.step import Forward, losses


def validate(
    forward: Forward,
    decoder: Decoder,
    job: Job,
    byte_counts: Tensor | None,
    check: Callable[[], None],
) -> dict[str, float]:
    """`validation_loss`, each metric of the objective, `bits_per_byte` of the text that labels stand for.

    Of the first `validation_rows` rows, however they are split. `check` is called between blocks and may
    raise. Gradients stay on, unused: without them torch.compile would build every block a second time.
    """
    assert job.validation is not None
    watched = replace(forward, check=check)
    objective = job.objective
    sums, count, text = [0.0] * (1 + len(objective.metrics)), 0, 0
    stream = job.validation.batches(job.loop.micro_rows)
    stream.watch(check)
    for start in range(0, job.loop.validation_rows, job.loop.micro_rows):
        batch = next(stream).labelled(job.loop.validation_rows - start)
        if not len(batch.labels):
            break
        loss = losses(watched, decoder, batch, objective)
        sums = [a + float(b.detach()) for a, b in zip(sums, (loss.total, *loss.sums), strict=True)]
        count += objective.count(batch)
        if byte_counts is not None:
            text += int(byte_counts[batch.labels[batch.labels != IGNORE]].sum())
    found = dict(zip(("loss", *objective.metrics), sums, strict=True))
    row = {f"validation_{name}": total / max(1, count) for name, total in found.items()}
    if text and objective.nll:
        row["bits_per_byte"] = found[objective.nll] / math.log(2) / text
    return row


def token_byte_counts(tokenizer: Path) -> Tensor:
    """Bytes of text behind each id of a tokenizer's directory; 0 for special tokens."""
    return torch.tensor([len(b) for b in Tokenizer.load(tokenizer).token_bytes])
