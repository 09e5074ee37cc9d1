"""Seeds, folders, versions."""

import ctypes
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from microlm.core import runtime


def test_seeds_are_stable_and_separate() -> None:
    assert runtime.derive_seed(0, "a") == runtime.derive_seed(0, "a") == 8617095791668180470
    assert len({runtime.derive_seed(s, *n) for s in (0, 1) for n in (("a",), ("b",), ("a", 1), ("a1",))}) == 8
    assert runtime.rng(3, "x").random() == runtime.rng(3, "x").random()


def test_a_seed_sets_every_generator() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        runtime.set_seed(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first, other = draw(3), draw(1 << 40)
    assert draw(3) == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_ctrl_c_in_a_callback_from_c_is_not_lost() -> None:
    """Python itself drops it there, with a line on stderr."""
    call = ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))
    hook, sys.unraisablehook = sys.unraisablehook, lambda args: None
    try:
        call()  # lost
        went_on = False
        with pytest.raises(KeyboardInterrupt), runtime.interruptible():
            call()
            went_on = True
    finally:
        sys.unraisablehook = hook
    assert went_on
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_ctrl_c_outside_callbacks_ends_the_block_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), runtime.interruptible():
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("MICROLM_CACHE", raising=False)
    assert runtime.cache_dir() == Path("/xdg/microlm")
    monkeypatch.setenv("MICROLM_CACHE", "/mine")
    assert runtime.cache_dir() == Path("/mine")


def test_a_machine_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("git")

    runtime.code_commit.cache_clear()
    monkeypatch.setattr(subprocess, "run", missing)
    assert runtime.code_commit() is None
    runtime.code_commit.cache_clear()


def test_a_changed_package_is_marked_in_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        names = ("-c", "user.name=t", "-c", "user.email=t@t")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def told() -> str | None:
        runtime.code_commit.cache_clear()
        return runtime.code_commit()

    module = tmp_path / "microlm/core/runtime.py"
    module.parent.mkdir(parents=True)
    module.write_text("x = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(runtime, "__file__", str(module))
    try:
        head = git("rev-parse", "HEAD")
        (tmp_path / "notes.txt").write_text("not code")
        assert told() == head
        module.write_text("x = 2\n")
        assert told() == f"{head}+dirty"
        git("checkout", "-q", "--", ".")
        (module.parent / "new.py").write_text("")
        assert told() == f"{head}+dirty"
    finally:
        monkeypatch.undo()
        runtime.code_commit.cache_clear()


def test_environment_and_versions() -> None:
    told = runtime.environment(2)
    assert told["world"] == 2 and told["torch"] == runtime.package_version("torch")
    assert runtime.package_version("no-such-package") is None
    assert runtime.peak_rss_bytes() > 1_000_000


FAULTS = """
import resource, sys, torch
from microlm.core import runtime
runtime.give_memory_back()
if sys.argv[1:]: runtime.keep_memory()
def touch():
    for _ in range(50): torch.ones(1 << 20)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_training_does_not_ask_the_system_for_the_same_memory_in_every_step() -> None:
    """As it would after a data stage in the same process, which gives every large array back."""
    given, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, *words], capture_output=True, check=True).stdout)
        for words in ([], ["keep"])
    )
    assert kept * 10 < given
