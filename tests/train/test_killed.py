"""`kill -9` at twenty random moments, in mid-save too: a run that goes on equals an undisturbed one.

Equal byte for byte: weights, the optimizers' state, every random state, the log of losses.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microlm.core import runtime
from microlm.core.metrics import read_metrics
from microlm.train.reporter import TIMED

KILLS = 20


class Nursery:
    """The process that forks runs."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("killed_runs.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=runtime.child_env({"OMP_NUM_THREADS": "1"}),
        )  # fmt: skip

    def run(self, folder: Path, dtype: str, die_at: int = 0, kill_at_s: float = 0) -> tuple[int, float]:
        """How a run ended, and the processor time that it took."""
        assert self.process.stdin and self.process.stdout
        order = {"folder": str(folder), "dtype": dtype, "die_at": die_at, "kill_at_s": kill_at_s}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        code, used_s = json.loads(self.process.stdout.readline())
        return code, used_s


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    found = Nursery()
    yield found
    assert found.process.stdin
    found.process.stdin.close()
    found.process.wait(20)


def content(folder: Path) -> dict[str, Any]:
    """All that a run leaves but for times: every byte of its checkpoints, its weights, its rows."""
    found: dict[str, Any] = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.relative_to(folder).parts[0] != "logs" and p.name != "operations"
    }
    untold = {"time", *TIMED}
    rows = read_metrics(folder / "logs/metrics.jsonl")
    return found | {"rows": [{k: v for k, v in r.items() if k not in untold} for r in rows]}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks with torch loaded")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_twenty_times_equals_undisturbed(nursery: Nursery, tmp_path: Path, dtype: str) -> None:
    """Half of the kills come by the clock, half at an operation on files."""
    whole = tmp_path / "whole"
    code, used_s = nursery.run(whole, dtype)
    assert code == 0
    operations = int((whole / "operations").read_text())
    expected = content(whole)
    assert {"resume/step-00000011/checkpoint.json", "resume/step-00000010/model.safetensors"} <= set(expected)
    rng, kills, cut_saves = random.Random(dtype), 0, 0
    for chain in range(KILLS):
        folder = tmp_path / str(chain)
        while kills < KILLS:
            by_clock = kills % 2 == 0
            moment = rng.uniform(0.05, 0.5) * used_s
            place = rng.randrange(1, operations // 2)
            ended, _ = (
                nursery.run(folder, dtype, 0, moment) if by_clock else nursery.run(folder, dtype, place)
            )
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
            kills += 1
            cut_saves += bool(list((folder / "resume").glob("*.part")))
        assert nursery.run(folder, dtype)[0] == 0
        assert content(folder) == expected
        if kills == KILLS:
            break
    assert kills == KILLS
    assert cut_saves >= 3


def test_the_runs_are_sensitive(nursery: Nursery, tmp_path: Path) -> None:
    """Losing the random states would show: the noise of the loss reaches every weight."""
    assert nursery.run(tmp_path / "a", "float32", die_at=200)[0] == -signal.SIGKILL
    last = max((tmp_path / "a/resume").glob("step-????????"))
    head = json.loads((last / "checkpoint.json").read_text())
    assert len(head["position"]["random"]["torch"]) == 2 * 5056
    assert head["position"]["random"]["python"][2] is None
