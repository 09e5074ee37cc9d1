"""Lines on a log file, a bar on a terminal, metrics.jsonl and TensorBoard that agree."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from faults import Crash, Disk

from microlm.core import metrics
from microlm.core.metrics import MetricsLog, Progress, read_metrics


def test_progress_off_a_terminal_writes_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with Progress("pretrain", 4000, "tokens") as bar:
        for _ in range(4):
            clock[0] += 6
            bar.update(1000, loss=1.23456, phase="warm")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "pretrain: 2,000/4,000 (50%) tokens, 167 tokens/s, 0:00:12 left loss 1.235 phase warm",
        "pretrain: 4,000/4,000 (100%) tokens, 167 tokens/s loss 1.235 phase warm",
        "pretrain: 4,000/4,000 (100%) tokens, 167 tokens/s loss 1.235 phase warm",
    ]


def test_the_rate_after_a_resume_counts_what_was_done_since(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with Progress("sft", 4000, "tokens", start=3000) as bar:
        clock[0] += 20
        bar.update(1000)
    assert capsys.readouterr().err.splitlines() == ["sft: 4,000/4,000 (100%) tokens, 50 tokens/s"] * 2


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("data", None, "lines") as bar:
        bar.update(3, kept=2)
    assert "data" in screen.getvalue() and "kept 2" in screen.getvalue()


def test_metrics_and_tensorboard_hold_the_same_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, loss=2.5, rate=1e-3)
        log.log(2, loss=float("nan"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["schema"], r["step"], r["loss"]) for r in rows] == [(1, 1, 2.5), (1, 2, None)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("rate")] == [(1, 0.001)]
    assert [e.step for e in events.Scalars("loss")] == [1, 2]


def test_a_resumed_log_replaces_what_it_writes_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(5):
            log.log(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"schema": 1, "st')  # cut off by a crash
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    with MetricsLog(tmp_path, start_step=3) as log:
        log.log(3, loss=30.0)
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 30]
    with MetricsLog(tmp_path):
        pass
    assert read_metrics(tmp_path / "metrics.jsonl") == read_metrics(tmp_path / "no.jsonl") == []


def test_a_resume_that_is_cut_off_loses_no_row(tmp_path: Path) -> None:
    """A crash before each operation on files of a log that is opened again."""
    with MetricsLog(tmp_path / "whole") as log:
        for step in range(5):
            log.log(step, loss=float(step))
    at = 0
    while True:
        at += 1
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(at))
        with pytest.MonkeyPatch.context() as patch:
            Disk(folder, at, "torn").install(patch, ())
            try:
                MetricsLog(folder, start_step=3).close()
                break
            except Crash:
                pass
        assert [r["step"] for r in read_metrics(folder / "metrics.jsonl")][:3] == [0, 1, 2]
    assert at > 4


def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        for step in range(5):
            log.log(step, loss=float(step))
    with MetricsLog(tmp_path, start_step=3) as log:
        log.log(3, loss=30.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 2), (3, 30)]
