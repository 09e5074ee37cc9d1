"""The progress line, rows of metrics, and what happens at intervals: validation, samples. Rank 0 speaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from microlm.core.metrics import FILE, MetricsLog, Progress, read_metrics
from microlm.model.transformer import Decoder
from microlm.train.batches import Stream
from microlm.train.checkpoint import Position
from microlm.train.job import Job
from microlm.train.ranks import Ranks, Stopped
from microlm.train.reporter.samples import SampleLog
from microlm.train.reporter.speed import Speed
from microlm.train.reporter.trackers import Tracker
from microlm.train.reporter.validation import token_byte_counts, validate
from microlm.train.step import Forward


class Reporter:
    """Silent on all ranks but the first."""

    def __init__(
        self,
        ranks: Ranks,
        job: Job,
        at: Position,
        stream: Stream,
        decoder: Decoder,
        stopped: Callable[[], bool],
    ) -> None:
        self.job, self.at, self.decoder, self.active = job, at, decoder, ranks.rank == 0
        self.stopped = stopped
        if not self.active:
            return
        total = job.loop.steps * job.loop.batch_rows * job.loop.context
        self.bar = Progress(job.name, total, "tokens", start=at.tokens)
        self.log = _reopen_log(job.logs, at)
        self.samples = SampleLog(job, at, decoder)
        self.tracker = Tracker(job) if job.loop.tracker != "none" else None
        self.speed = Speed(decoder, job.loop, stream, ranks.size)
        self.byte_counts = token_byte_counts(job.tokenizer) if job.tokenizer else None

    def __enter__(self) -> Reporter:
        if self.active:
            self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.active:
            self.bar.__exit__(*error)
            self.log.close()
            self.samples.close()
            if self.tracker:
                self.tracker.close()

    def begin(self, forward: Forward) -> None:
        """The loss before any step, so that a curve starts where the run did; or what a stop cut off."""
        if not self.active:
            return
        if self.at.step == 0 and not self.at.history and self._validates():
            self.at.owed = {"tokens": 0.0}
        self._settle(forward, {})
        self.speed.start()

    def rewind(self) -> None:
        """The run went back: what was logged since is no part of it."""
        if self.active:
            self.bar.done = float(self.at.tokens)
            self.log.close()
            self.log = _reopen_log(self.job.logs, self.at)
            self.samples.reopen()
            self.speed.start()

    def step(self, means: list[float], rate: float, norm: float, forward: Forward) -> None:
        """Report a finished step: loss and metrics, the share of the recipe's rate, the norm unclipped."""
        if not self.active:
            return
        loop, at = self.job.loop, self.at
        positions = at.tokens - round(self.bar.done)
        self.speed.step(positions)
        at.recent = [*at.recent, means][-loop.log_steps :]
        mean, *others = (sum(values) / len(values) for values in zip(*at.recent, strict=True))
        self.bar.total = at.tokens / at.step * loop.steps  # rollouts do not know how many rows they will fill
        self.bar.update(positions, loss=mean)
        timed = {}
        if at.step == loop.steps or at.step % loop.log_steps == 0 or self._validates():
            timed = self.speed.row()
            at.owed = {"tokens": float(at.tokens), "loss": mean, "rate": rate, "grad_norm": norm}
            at.owed |= zip(self.job.objective.metrics, others, strict=True)
        self._settle(forward, timed)
        self.speed.start()

    def _settle(self, forward: Forward, timed: dict[str, float]) -> None:
        """Validate, write the row, let the model speak; what a stop cuts off is owed."""
        row = dict(self.at.owed)
        try:
            if row and self._validates():
                row |= validate(forward, self.decoder, self.job, self.byte_counts, self._check)
            if row:
                self._write(row, timed)
                self._show(row, timed)
                self.at.owed = {}
            if self.samples.due():
                self.samples.add(self._check)
        except Stopped:
            return

    def _check(self) -> None:
        if self.stopped():
            raise Stopped

    def _validates(self) -> bool:
        loop, step = self.job.loop, self.at.step
        due = step == loop.steps or step % loop.validation_steps == 0
        return due and self.job.validation is not None and loop.validation_rows > 0

    def _show(self, row: dict[str, float], timed: dict[str, float]) -> None:
        known = {"bpb": "bits_per_byte", "val": "validation_loss"}
        shown: dict[str, float | str] = {k: row[name] for k, name in known.items() if name in row}
        if timed:
            shown |= {"MFU": f"{timed['mfu']:.0%}", "mem": f"{timed['peak_memory_bytes'] / 1e9:.2g} GB"}
        if timed.get("data_wait_share", 0.0) >= 0.01:
            shown["data wait"] = f"{timed['data_wait_share']:.0%}"
        self.bar.show(**shown)

    def _write(self, row: dict[str, float], timed: dict[str, float]) -> None:
        """What an equal run would repeat is part of the history that checkpoints keep; times are not."""
        self.at.history.append({"step": float(self.at.step), **row})
        self.log.log(self.at.step, **row, **timed)
        if self.tracker:
            self.tracker.log(self.at.step, row | timed)


def _reopen_log(logs: Path, at: Position) -> MetricsLog:
    """The metrics as they stood at the checkpoint: the file's rows (with their times) if these are right."""
    kept = [row for row in read_metrics(logs / FILE) if row["step"] <= at.step]
    pairs = zip(kept, at.history, strict=False)
    told = (row.get(name) == value for row, known in pairs for name, value in known.items())
    if len(kept) == len(at.history) and all(told):
        return MetricsLog(logs, at.step + 1)
    log = MetricsLog(logs)
    for row in at.history:
        log.log(int(row["step"]), **{k: v for k, v in row.items() if k != "step"})
    return log
