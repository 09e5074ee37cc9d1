"""The loss on held-out rows, per label and per byte of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from microlm.model.transformer import Decoder
from microlm.text.tokenizer import Tokenizer
from microlm.train.batches import IGNORE
from microlm.train.job import Job
from microlm.train.step import Forward, losses


class Stopped(Exception):
    """Somebody wants the run to stop: the validation is given up."""


def validate(
    forward: Forward,
    decoder: Decoder,
    job: Job,
    byte_counts: Tensor | None,
    stopped: Callable[[], bool],
) -> dict[str, float]:
    """`validation_loss` in nats per label, and `bits_per_byte` of the text that the labels stand for.

    Gradients stay on, unused: without them torch.compile would build every block a second time.
    """
    assert job.validation is not None
    total, count, text = 0.0, 0, 0
    stream = job.validation.batches(job.loop.micro_rows)
    for _ in range(max(1, job.loop.validation_rows // job.loop.micro_rows)):
        if stopped():
            raise Stopped
        batch = next(stream)
        total += float(losses(forward, decoder, batch, job.objective).detach())
        count += batch.label_count
        if byte_counts is not None:
            text += int(byte_counts[batch.labels[batch.labels != IGNORE]].sum())
    row = {"validation_loss": total / max(1, count)}
    return row | {"bits_per_byte": total / math.log(2) / text} if text else row


def token_byte_counts(tokenizer: Path) -> Tensor:
    """Bytes of text behind each id of a tokenizer's directory; 0 for special tokens."""
    return torch.tensor([len(b) for b in Tokenizer.load(tokenizer).token_bytes])
