"""Seeds: JSON objects, one a line. Enters: a JSONL file (plain, gzip, zstd); leaves: objects and drops."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import zstandard

from microlm.core.errors import UserError
from microlm.text.read import Drop, Fault, parse_json

MAX_LINE_BYTES = 32 << 20
Seed = tuple[str, Mapping[str, Any]]
"""Its place (`file:line`) and its fields."""


def read_seeds(path: Path) -> Iterator[Seed | Drop]:
    """The objects of a file in order, each fault a Drop; a file that cannot be read on is a UserError."""
    number = 0
    try:
        with closing(_open(path)) as lines:
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                place = f"{path.name}:{number}"
                if len(line) > MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = lines.readline(MAX_LINE_BYTES)
                    yield Drop("line_too_long", place, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
                    continue
                try:
                    yield place, parse_json(line)
                except Fault as fault:
                    yield Drop(fault.reason, place, fault.detail)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as e:
        raise UserError(f"{path}:{number + 1}: the packed file is damaged ({e}); fetch it again") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); check the path") from None


def numbered(count: int) -> Iterator[Seed | Drop]:
    """Seeds out of nothing: each has its number."""
    for number in range(count):
        yield str(number), {"number": number}


def _open(path: Path) -> IO[bytes]:
    file = path.open("rb")
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if path.suffix == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return io.BufferedReader(reader, 1 << 20)
    return file
