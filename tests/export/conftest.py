"""A data artifact, a tokenizer and a random model of this room, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import write_data, write_model, write_tokenizer

from microlm.core.artifact import Artifact


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the shared artifacts."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def data(root: Path) -> Artifact:
    return write_data(root / "data")


@pytest.fixture(scope="session")
def tokenizer(root: Path, data: Artifact) -> Artifact:
    return write_tokenizer(root / "tokenizer", data)


@pytest.fixture(scope="session")
def model(root: Path, data: Artifact, tokenizer: Artifact) -> Artifact:
    return write_model(root / "sft", tokenizer, data)
