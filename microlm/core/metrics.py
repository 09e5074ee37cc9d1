"""Progress for people (stderr) and metrics for programs (metrics.jsonl and TensorBoard events).

Enters: counts and named numbers. Leaves: a bar, or a line every ten seconds; metrics.jsonl, tensorboard/.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from microlm.core import storage

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

SCHEMA = 1
FILE = "metrics.jsonl"
LINE_EVERY_S = 10.0


class Progress:
    """`with Progress("pretrain", total, "tokens") as bar: bar.update(n, loss=…)`.

    A bar on a terminal; elsewhere (a log file, CI) a plain line every ten seconds and one at the end.
    `total` None means that nobody knows it; `start` were done by an earlier run and do not count as speed.
    """

    def __init__(
        self, name: str, total: float | None = None, unit: str = "items", start: float = 0.0
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.start = self.done = start
        self._started = self._shown = time.monotonic()
        self._values: dict[str, float | str] = {}
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._started = self._shown = time.monotonic()
        if sys.stderr.isatty():
            self._bar = _rich_bar()
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, completed=int(self.done), values="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._write_line()

    def update(self, n: float = 1, **values: float | str) -> None:
        """`n` more are done; `values` are shown beside the count."""
        self.done += n
        self.show(**values)

    def show(self, **values: float | str) -> None:
        """Set values that are shown beside the count."""
        self._values |= values
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                total=self.total,
                completed=int(self.done),
                values=f"{self._rate()} {self._shown_values()}",
            )
        elif time.monotonic() - self._shown >= LINE_EVERY_S:
            self._write_line()

    def _write_line(self) -> None:
        self._shown = time.monotonic()
        of = f"/{self.total:,.0f} ({self.done / self.total:.0%})" if self.total else ""
        line = f"{self.name}: {self.done:,.0f}{of} {self.unit}, {self._rate()}{self._left()}"
        sys.stderr.write(f"{line} {self._shown_values()}".rstrip() + "\n")
        sys.stderr.flush()

    def _per_second(self) -> float:
        seconds = time.monotonic() - self._started
        return (self.done - self.start) / seconds if seconds > 0 else 0.0

    def _rate(self) -> str:
        rate = self._per_second()
        return f"{rate:,.0f} {self.unit}/s" if rate else ""

    def _left(self) -> str:
        """The time that the rest takes at this rate."""
        rate = self._per_second()
        if not self.total or self.done >= self.total or rate <= 0:
            return ""
        return f", {timedelta(seconds=round((self.total - self.done) / rate))} left"

    def _shown_values(self) -> str:
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self._values.items())
        return " ".join(shown)


class MetricsLog:
    """Named numbers per step: one JSON line each in `folder/metrics.jsonl`, and TensorBoard events.

    A stage that resumes at `start_step` keeps the earlier lines and drops those it is about to write again.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        self.path, self._start = folder / FILE, start_step
        kept = [row for row in read_metrics(self.path) if row["step"] < start_step] if start_step else []
        with storage.explain_write(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            storage.write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
            self._file = self.path.open("a", encoding="utf-8", newline="\n")
        self._board: EventFileWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, step: int, **values: float) -> None:
        """Write the values of a step; one that is not finite is written as null."""
        now = time.time()
        finite = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        with storage.explain_write(self.path):
            self._file.write(json.dumps({"schema": SCHEMA, "step": step, "time": now, **finite}) + "\n")
            self._file.flush()
        self._log_events(step, now, values)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _log_events(self, step: int, now: float, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._board is None:
            self._board = EventFileWriter(str(self.path.parent / "tensorboard"))
            begins = SessionLog(status=SessionLog.START)  # TensorBoard drops what it knows of later steps
            self._board.add_event(Event(step=self._start, wall_time=now, session_log=begins))
        rows = [Summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        self._board.add_event(Event(step=step, wall_time=now, summary=Summary(value=rows)))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl without a line that a crash cut off; none when it is not there."""
    return list(_rows(path)) if path.exists() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def _rich_bar() -> RichProgress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[values]}"),
        console=Console(stderr=True),
    )
