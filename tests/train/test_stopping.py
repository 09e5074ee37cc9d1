"""SIGTERM and Ctrl-C: a checkpoint and the end within ten seconds, however long a step is; twice: now."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from artifacts import write_data, write_tokenizer
from torch import Tensor
from training import CONTEXT, make_job, tiny_decoder, tiny_loop

from microlm.core import runtime
from microlm.core.artifact import open_artifact
from microlm.model import directory
from microlm.model.transformer import Decoder
from microlm.text import shards
from microlm.text.shards import TokenizeRecipe
from microlm.train import objectives
from microlm.train.batches import Batch
from microlm.train.loop import train
from microlm.train.ranks import Ranks

ALONE = Ranks(0, 1)
LIMIT_S = 10


def press(number: int, *after_s: float) -> list[threading.Timer]:
    """Send a signal to ourselves after some times."""
    timers = [threading.Timer(s, os.kill, (os.getpid(), number)) for s in after_s]
    for timer in timers:
        timer.start()
    return timers


def seconds_of(call: Callable[[], object]) -> float:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        call()
    return time.monotonic() - started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_long_step_is_given_up(tmp_path: Path, number: int) -> None:
    """After two quick steps one of 40 s begins; the stop comes into it and nothing of it is kept."""
    calls = 0

    def slow(hidden: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 400:
            time.sleep(0.2)
        if calls == 405:
            press(number, 0.0)
        return objectives.next_token(hidden, decoder, batch)

    loop = tiny_loop(batch_rows=200, micro_rows=1, tokens=10 * 200 * CONTEXT, validation_rows=0)
    job = make_job(tmp_path, loop, objective=slow, validation=None)
    started = time.monotonic()
    seconds_of(lambda: train(ALONE, tiny_decoder(), job))
    assert calls < 420
    assert [p.name for p in job.resume.glob("step-*")] == ["step-00000002"]
    assert time.monotonic() - started < 60


def test_a_second_signal_does_not_wait_for_the_checkpoint(tmp_path: Path) -> None:
    """The first one finds a disk that takes half a minute; the second one ends the run, nothing half done."""
    began = threading.Event()

    def endless(decoder: Decoder, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        began.set()
        time.sleep(30)
        directory.save(decoder, folder)

    def again() -> None:
        assert began.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    calls = 0

    def objective(hidden: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=again).start()
        return objectives.next_token(hidden, decoder, batch)

    loop = tiny_loop(checkpoint_steps=100, validation_rows=0)
    job = make_job(tmp_path, loop, objective=objective, validation=None, save_weights=endless)
    assert seconds_of(lambda: train(ALONE, tiny_decoder(), job)) < LIMIT_S
    assert not list(job.resume.glob("step-????????"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokens")
    data = write_data(folder / "data")
    tokenizer = write_tokenizer(folder / "tokenizer", data)
    recipe = TokenizeRecipe(out=str(folder / "shards"), data=data.url, tokenizer=tokenizer.url)
    return shards.run(recipe).url


def command(folder: Path, tokens: str) -> list[str]:
    """A pretraining whose steps have 64 micro-batches."""
    shape = {
        "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "intermediate_size": 64,
    }  # fmt: skip
    loop: dict[str, Any] = {
        "tokens": 6 * 64 * CONTEXT, "context": CONTEXT, "batch_rows": 64, "micro_rows": 1, "log_steps": 1,
        "compile": False, "dtype": "float32", "validation_rows": 4, "keep_best": True, "validation_steps": 2,
    }  # fmt: skip
    recipe = {
        "stage": "pretrain", "out": str(folder / "out"), "shards": tokens, "architecture": shape,
        "loop": loop, "parallel": {"processes": 1, "threads": 1},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [sys.executable, "-m", "microlm", "pretrain", str(folder / "recipe.yaml")]


@pytest.mark.slow
def test_sigterm_ends_a_real_run_within_ten_seconds(tokens: str, tmp_path: Path) -> None:
    env = runtime.child_env({"OMP_NUM_THREADS": "1"})
    (tmp_path / "whole").mkdir()
    subprocess.run(command(tmp_path / "whole", tokens), check=True, env=env)
    words = command(tmp_path, tokens)
    process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out.tmp/logs/metrics.jsonl"
    end = time.monotonic() + 240
    while not (metrics.exists() and '"step": 2' in metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - asked < LIMIT_S
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "run the same command again to continue" in said
    assert list((tmp_path / "out.tmp/resume").glob("step-????????"))
    subprocess.run(words, check=True, env=env)
    found, whole = (open_artifact(str(f / "out")) for f in (tmp_path, tmp_path / "whole"))
    assert found.digest == whole.digest
    assert directory.load(found.path / "best").config == directory.load(found.path).config
    assert (found.path / "best/tokenizer.json").exists()
