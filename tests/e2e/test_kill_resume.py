"""`microlm run` killed at ten random moments and started again gives the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from microlm.core import runtime
from microlm.core.artifact import open_artifact

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]
RECIPE = Path(__file__).parents[2] / "recipes/tiny.yaml"
KILLS = 10


def command(out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "microlm",
        "run",
        str(RECIPE),
        f"output={out}",
        "pretrain.loop.compile=true",
        "--json",
    ]


def finish(out: Path) -> list[dict[str, Any]]:
    """Run to the end; the stages as the command reports them."""
    env = runtime.child_env({"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command(out), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stages: list[dict[str, Any]] = json.loads(done.stdout)["stages"]
    return stages


def session(leader: int) -> list[int]:
    """The living processes of a session (zombies are dead)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z" and int(fields[3]) == leader:
                found.append(int(entry.name))
    return found


def kill_after(out: Path, seconds: float, whole_group: bool) -> bool:
    """Start a run and kill it after some seconds; False when it had ended by itself. Nobody may be left."""
    env = runtime.child_env({"OMP_NUM_THREADS": "1"})
    process = subprocess.Popen(
        command(out), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert process.wait(timeout=seconds) == 0
        return False
    except subprocess.TimeoutExpired:
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
    end = time.monotonic() + 30
    while left := session(process.pid):
        assert time.monotonic() < end, f"still running: {left}"
        time.sleep(0.1)
    return True


def digests(stages: list[dict[str, Any]]) -> dict[str, str]:
    return {s["name"]: s["digest"] for s in stages}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """The digests of a run that nobody disturbs, and how long it took."""
    started = time.monotonic()
    stages = finish(tmp_path_factory.mktemp("undisturbed") / "out")
    assert not any(s["skipped"] for s in stages)
    return digests(stages), time.monotonic() - started


def test_two_runs_are_equal_in_every_stage(undisturbed: tuple[dict[str, str], float], tmp_path: Path) -> None:
    assert digests(finish(tmp_path / "out")) == undisturbed[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_killed_ten_times_equals_undisturbed(
    undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    out, rng = tmp_path / "out", random.Random(0)
    expected, seconds = undisturbed
    killed = sum(
        kill_after(out, rng.uniform(0.02, 0.4) * seconds, whole_group=bool(i % 2)) for i in range(KILLS)
    )
    assert killed >= KILLS // 2
    assert digests(finish(out)) == expected
    assert all(s["skipped"] for s in finish(out))
    assert not list(out.glob("*.tmp"))
    for name, digest in expected.items():
        assert open_artifact(str(out / name)).digest == digest
