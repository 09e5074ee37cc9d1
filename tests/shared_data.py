"""The real corpora beside the repository (`../shared/data`), for tests marked `shared`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import zstandard

DATA = Path(__file__).parents[2] / "shared" / "data"


def raw_lines(name: str) -> Iterator[bytes]:
    """The lines of a file of the shared folder, without their ends."""
    path = DATA / name
    with path.open("rb") as file:
        rest = b""
        for piece in zstandard.ZstdDecompressor().read_to_iter(file):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
    if rest:
        yield rest
