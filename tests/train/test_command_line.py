"""Training as a user starts it: `microlm run`, Ctrl-C and again, and the same command under torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from artifacts import write_data
from training import STAGES, digests, write_recipe

from microlm.core import runtime
from microlm.core.artifact import open_artifact

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # other work may hold the cores
COMMAND = [sys.executable, "-m", "microlm", "run"]
ENV = runtime.child_env({"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "data"
    write_data(folder)
    return str(folder)


@pytest.fixture(scope="module")
def undisturbed(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder / "recipe.yaml", data, str(folder / "out"))
    subprocess.run([*COMMAND, str(recipe)], check=True, env=ENV)
    found = digests(folder / "out")
    assert tuple(found) == STAGES
    assert open_artifact(str(folder / "out/sft")).manifest["environment"]["world"] == 2
    return found


def test_ctrl_c_saves_and_the_same_command_goes_on(
    data: str, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(write_recipe(tmp_path / "recipe.yaml", data, str(out)))]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True)
    resume = out / "pretrain.tmp/resume"
    end = time.monotonic() + 600
    while not list(resume.glob("step-????????")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "interrupted in stage 'pretrain'; run the same command again to continue" in said
    assert list(resume.glob("step-????????"))
    assert "pretrain" not in digests(out)
    subprocess.run(command, check=True, env=ENV)
    assert digests(out) == undisturbed
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("delay_s", [0.0, 0.3, 2.0])
def test_ctrl_c_while_ranks_start_is_quiet(
    delay_s: float, data: str, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(write_recipe(tmp_path / "recipe.yaml", data, str(out)))]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 600
    while not (out / "pretrain.tmp/resume/key").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(delay_s)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in said
    subprocess.run(command, check=True, env=ENV)
    assert digests(out) == undisturbed


def test_torchrun_gives_the_same_bytes(data: str, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Two ranks of torchrun walk through all stages; only rank 0 writes."""
    recipe = write_recipe(tmp_path / "recipe.yaml", data, str(tmp_path / "out"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for state in ("done", "skipped"):
        done = subprocess.run(
            [*launcher, "-m", *COMMAND[2:], str(recipe)], env=ENV, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert digests(tmp_path / "out") == undisturbed
        worlds = [open_artifact(str(tmp_path / "out" / n)).manifest["environment"]["world"] for n in STAGES]
        assert worlds == [1, 2, 2, 2, 2]
        assert re.findall(r"\[\d/5\] \w+ +(\w+)", done.stderr) == [state] * 5  # rank 0 alone speaks
        assert done.stdout.count("finished, 5 stages") == len(done.stdout.splitlines()) == 1
    plan = subprocess.run(
        [*launcher, "-m", *COMMAND[2:], str(recipe), "--dry-run", "--json"],
        env=ENV,
        check=True,
        capture_output=True,
    )
    assert len(json.loads(plan.stdout)["plan"]) == 5
