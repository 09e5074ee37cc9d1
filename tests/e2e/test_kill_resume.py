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
from typing import Any, NamedTuple

import pytest

from microlm.core import runtime
from microlm.core.artifact import open_artifact

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]
RECIPE = Path(__file__).parents[2] / "recipes/tiny.yaml"
KILLS = 10


class Undisturbed(NamedTuple):
    """A run that nobody disturbs: stage → digest, and how long it took after starting up."""

    digests: dict[str, str]
    startup_s: float
    work_s: float


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
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    times = [time.monotonic()]
    subprocess.run([*command(out), "--dry-run"], check=True, stdout=subprocess.DEVNULL)
    times.append(time.monotonic())
    stages = finish(out)
    times.append(time.monotonic())
    assert not any(s["skipped"] for s in stages)
    startup = times[1] - times[0]
    return Undisturbed(digests(stages), startup, times[2] - times[1] - startup)


def test_two_runs_are_equal_in_every_stage(undisturbed: Undisturbed, tmp_path: Path) -> None:
    assert digests(finish(tmp_path / "out")) == undisturbed.digests


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_killed_ten_times_equals_undisturbed(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A run that ends before its share of kills is checked, and the kills go on in a new folder."""
    rng, kills = random.Random(0), 0
    for chain in range(KILLS):
        out = tmp_path / f"chain-{chain}"
        while kills < KILLS:
            seconds = undisturbed.startup_s + rng.uniform(0.04, 0.3) * undisturbed.work_s
            if not kill_after(out, seconds, whole_group=bool(kills % 2)):
                break
            kills += 1
        assert_undisturbed(out, undisturbed)
        if kills == KILLS:
            break
    assert kills == KILLS


def assert_undisturbed(out: Path, expected: Undisturbed) -> None:
    """Run to the end what was killed: the same bytes, nothing left to do, nothing left behind."""
    assert digests(finish(out)) == expected.digests
    assert all(s["skipped"] for s in finish(out))
    assert not list(out.glob("*.tmp"))
    for name, digest in expected.digests.items():
        assert open_artifact(str(out / name)).digest == digest
