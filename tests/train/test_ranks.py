"""Real processes: two ranks = one, and a rank that dies leaves a sentence and no orphan."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import (
    Bomb,
    die_on_rank,
    disagree,
    do_nothing,
    fail_on_every_rank,
    muon_on_rank,
    refuse_on_rank,
    sleep_long,
    tiny_loop,
    train_on_rank,
)

from microlm.core.errors import UserError
from microlm.core.metrics import read_metrics
from microlm.core.recipe import Parallel
from microlm.model import directory
from microlm.train import ranks
from microlm.train.ranks import Ranks, launch

TWO = Parallel(processes=2, threads=1)
HERE = Path(__file__).parent.parent


def start(target: Callable[..., None], *args: Any) -> bool:
    """Launch on two ranks; whatever comes of it, nobody is left and the threads are as before."""
    threads = torch.get_num_threads()
    try:
        return launch(TWO, target, *args)
    finally:
        assert multiprocessing.active_children() == []
        assert not torch.distributed.is_initialized()
        assert torch.get_num_threads() == threads


def test_one_process_is_called_in_place() -> None:
    seen: list[tuple[int, int, int]] = []

    def target(group: Ranks, extra: int) -> None:
        seen.append((group.rank, group.size, extra))
        assert torch.get_num_threads() == 1
        assert group.sum_(torch.ones(2)).tolist() == [1.0, 1.0]
        group.require_equal(7, "anything")

    assert launch(Parallel(processes=1, threads=1), target, 5)
    assert seen == [(0, 1, 5)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_meeting_point_cannot_be_reached_from_outside() -> None:
    store = ranks._open_store(2)
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()
        if f":{store.port:04X} " in line and line.split()[3] == "0A"
    ]
    assert listening == [f"0100007F:{store.port:04X}"]


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    launch(Parallel(processes=1, threads=1), train_on_rank, tmp_path / "one", tiny_loop())
    assert start(train_on_rank, tmp_path / "two", tiny_loop())
    one, two = (dict(directory.load(tmp_path / f).named_parameters()) for f in ("one", "two"))
    assert max(float((one[n] - two[n]).detach().abs().max()) for n in one) <= 1e-6
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "two/model.safetensors"
    ).read_bytes()
    losses = [
        [
            (r["step"], r.get("loss"), r.get("validation_loss"))
            for r in read_metrics(tmp_path / f / "logs/metrics.jsonl")
        ]
        for f in ("one", "two")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_shared_muon_equals_muon_alone(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    launch(Parallel(processes=1, threads=1), muon_on_rank, tmp_path, dtype)
    launch(Parallel(processes=size, threads=1), muon_on_rank, tmp_path, dtype)
    alone = np.load(tmp_path / "1-0.npy")
    for rank in range(size):
        np.testing.assert_array_equal(np.load(tmp_path / f"{size}-{rank}.npy"), alone)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"training process 1 was killed by SIGKILL .* run the same command again"
    ):
        start(die_on_rank, tmp_path, 1, signal.SIGKILL)
    assert time.monotonic() - started < 280
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_rank_that_never_comes_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"training process 1 ended with the error above"):
        start(do_nothing, Bomb())


@pytest.mark.slow
def test_what_only_one_rank_sees_is_said_by_rank_0(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"rank 1: the file is not there; mount it"):
        start(refuse_on_rank, 1)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_what_all_ranks_see_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"mixture: no token set 'x'"):
        start(fail_on_every_rank)
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match=r"differ in the checkpoint that they found: \[0, 1\]"):
        start(disagree)
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_python_drops_is_heard_at_the_next_sum() -> None:
    class Thing:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    seen: list[str] = []

    def target(group: Ranks) -> None:
        Thing()  # Python ignores what is raised in __del__
        seen.append("dropped")
        group.sum_(torch.zeros(1))
        seen.append("not heard")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        launch(Parallel(processes=1, threads=1), target)
    assert seen == ["dropped"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay_s", [0.001, 0.003, 0.01, 0.1, 1.0])
def test_a_stop_at_any_moment_of_the_start_leaves_nobody(
    delay_s: float, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    press = threading.Timer(delay_s, os.kill, (os.getpid(), number))
    started = time.monotonic()
    before = signal.signal(number, signal.default_int_handler)  # it may come before the ranks are started
    try:
        with pytest.raises(KeyboardInterrupt):
            press.start()
            start(sleep_long)
            time.sleep(60)
    finally:
        press.join()
        signal.signal(number, before)
    assert time.monotonic() - started < 60
    assert "Traceback" not in capfd.readouterr().err


def test_processes_without_work_are_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranks.warn_idle("sft", TWO, batch_rows=3, micro_rows=2)
    with pytest.warns(
        UserWarning, match=r"sft: 2 processes share 1 micro-batches a step .4 rows in pieces of 8."
    ):
        ranks.warn_idle("sft", TWO, batch_rows=4, micro_rows=8)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(what: Callable[[], bool], seconds: float = 280) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_ranks_die_with_rank_0(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
        "from pathlib import Path\nfrom training import wait_with_pids\n"
        "from microlm.core.recipe import Parallel\nfrom microlm.train.ranks import launch\n"
        "if __name__ == '__main__':\n"
        f"    launch(Parallel(processes=2, threads=1), wait_with_pids, Path({str(tmp_path)!r}))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        files = [tmp_path / f"rank-{r}" for r in (0, 1)]
        wait_until(lambda: all(f.exists() and f.read_text() for f in files) or parent.poll() is not None)
        pids = [int(f.read_text()) for f in files]
        assert pids[0] == parent.pid
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        wait_until(lambda: not alive(pids[1]), seconds=10)
    finally:
        parent.kill()
