"""A tiny model and a real server for this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Running, run_model
from tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def server(model_dir: Path) -> Iterator[Running]:
    """A server without a key."""
    with run_model(model_dir) as running:
        yield running
