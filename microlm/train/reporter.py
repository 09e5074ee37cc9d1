"""What people see of a run: progress, metrics, validation. Rank 0 speaks, the others are silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from microlm.core.metrics import FILE, MetricsLog, Progress, read_metrics
from microlm.model.transformer import Decoder
from microlm.train.batches import BatchStream
from microlm.train.checkpoint import Position
from microlm.train.job import Job
from microlm.train.ranks import Ranks
from microlm.train.step import Forward, losses


def validation_loss(forward: Forward, decoder: Decoder, job: Job) -> float:
    """Mean loss of the first validation rows, in nats per label.

    Gradients stay on, unused: without them torch.compile would build every block a second time.
    """
    assert job.validation is not None
    total, count = 0.0, 0
    stream = job.validation.batches(job.loop.micro_rows)
    for _ in range(max(1, job.loop.validation_rows // job.loop.micro_rows)):
        batch = next(stream)
        total += float(losses(forward, decoder, batch, job.objective).detach())
        count += batch.label_count
    return total / max(1, count)


class Reporter:
    """Rank 0's progress line, metrics and history; silent on the others."""

    def __init__(self, ranks: Ranks, job: Job, at: Position, stream: BatchStream) -> None:
        self.job, self.at, self.active = job, at, ranks.rank == 0
        if self.active:
            total = job.loop.steps * job.loop.batch_rows * job.loop.context
            self.bar = Progress(job.name, total, "tokens", start=at.tokens)
            self.log = _reopen_log(job.logs, at)

    def __enter__(self) -> Reporter:
        if self.active:
            self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.active:
            self.bar.__exit__(*error)
            self.log.close()

    def validate_first(self, forward: Forward, decoder: Decoder) -> None:
        """The loss before any step, so that a curve starts where the run did."""
        if self.at.step == 0:
            self._validate(forward, decoder, {"tokens": 0.0})

    def rewind(self) -> None:
        """The run went back: what was logged since is no part of it."""
        if self.active:
            self.bar.done = float(self.at.tokens)
            self.log.close()
            self.log = _reopen_log(self.job.logs, self.at)

    def step(self, loss: float, factor: float, norm: float, forward: Forward, decoder: Decoder) -> None:
        """Report a finished step."""
        if not self.active:
            return
        loop = self.job.loop
        recent = self.at.recent = [*self.at.recent, loss][-loop.log_steps :]
        self.bar.update(loop.batch_rows * loop.context, loss=sum(recent) / len(recent))
        last = self.at.step == loop.steps
        if self.at.step % loop.log_steps and not last:
            return
        loss = sum(recent) / len(recent)
        row = {"tokens": float(self.at.tokens), "loss": loss, "rate": factor, "grad_norm": norm}
        if last or self.at.step % loop.validation_steps == 0:
            self._validate(forward, decoder, row)
        else:
            self._write(row)

    def _validate(self, forward: Forward, decoder: Decoder, row: dict[str, float]) -> None:
        if self.active and self.job.validation is not None and self.job.loop.validation_rows:
            self._write(row | {"validation_loss": validation_loss(forward, decoder, self.job)})
        elif self.active and len(row) > 1:
            self._write(row)

    def _write(self, row: dict[str, float]) -> None:
        self.at.history.append({"step": float(self.at.step), **row})
        self.log.log(self.at.step, **row)


def _reopen_log(logs: Path, at: Position) -> MetricsLog:
    """The metrics as they stood at the checkpoint: the file's rows (they hold the times) if none is lost."""
    kept = [row for row in read_metrics(logs / FILE) if row["step"] <= at.step]
    if at.step and len(kept) == len(at.history):
        return MetricsLog(logs, at.step + 1)
    log = MetricsLog(logs)
    for row in at.history:
        log.log(int(row["step"]), **{k: v for k, v in row.items() if k != "step"})
    return log
