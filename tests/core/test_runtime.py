"""Seeds, folders, versions."""

import subprocess
from pathlib import Path

import pytest

from microlm.core import runtime


def test_seeds_are_stable_and_separate() -> None:
    assert runtime.derive_seed(0, "a") == runtime.derive_seed(0, "a") == 8617095791668180470
    assert len({runtime.derive_seed(s, *n) for s in (0, 1) for n in (("a",), ("b",), ("a", 1), ("a1",))}) == 8
    assert runtime.rng(3, "x").random() == runtime.rng(3, "x").random()


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


def test_environment_and_versions() -> None:
    told = runtime.environment()
    assert told["world"] == 1 and told["torch"] == runtime.package_version("torch")
    assert runtime.package_version("no-such-package") is None
    assert runtime.peak_rss_bytes() > 1_000_000
