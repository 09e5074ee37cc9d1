"""The real corpora beside the repository (`../shared/data`), for tests that skip where they are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

DATA = Path(__file__).parents[2] / "shared" / "data"


def raw_lines(name: str) -> Iterator[bytes]:
    """The lines of a file of the shared folder, without their ends; skips the test if it is not there."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"shared/data/{name} is not beside the repository")
    with path.open("rb") as file:
        rest = b""
        for piece in zstandard.ZstdDecompressor().read_to_iter(file):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
    if rest:
        yield rest
