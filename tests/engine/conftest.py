"""Engines over tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_model import write_model

from microlm.engine import Engine


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two cores are shared with others."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["qwen3", "llama", "qwen2"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory of each architecture."""
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 directory."""
    return write_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture
def make_engine(model: Path) -> Callable[..., Engine]:
    """Engines over the Qwen3 directory."""
    return lambda **options: Engine(model, **({"max_seqs": 8} | options))


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    """One with eight slots."""
    return make_engine()
