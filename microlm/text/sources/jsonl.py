"""JSON lines → blocks of whole lines. Enters: a file (plain, gzip, zstd). Leaves: `Lines`, about 8 MB each.

A plain file is cut by byte offsets, so that workers read their own part; a packed one is unpacked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.core.errors import UserError
from microlm.text.read import Drop, Fault, parse_json
from microlm.text.sources import packed
from microlm.text.sources.packed import Broken, is_plain, unpacked

BLOCK_BYTES = 8 << 20
_SPREAD = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*\{|\[[ \t\r]*\n|\{[ \t\r]*\n)"
)  # a JSON array, or pretty-printed


@dataclass(frozen=True, slots=True)
class Lines:
    """Whole lines of a file: `data`, or `size` bytes from `start` on; `fault` is what follows them."""

    path: Path
    label: str
    number: int
    start: int
    size: int
    data: bytes | None
    fault: Drop | None = None
    consumed: int = 0
    expected: str = "text"
    task: str = ""

    def objects(self) -> Iterator[tuple[str, dict[str, Any] | Drop]]:
        """`(file:line, object)`, or the drop of a line that is none."""
        data = self._bytes() if self.data is None else self.data
        number, start = self.number, 0
        while start < len(data):
            end = data.find(b"\n", start)
            end = len(data) if end < 0 else end
            place = f"{self.label}:{number}"
            yield place, _object(data, start, end, place)
            number, start = number + 1, end + 1
        if self.fault:
            yield self.fault.place, self.fault

    def _bytes(self) -> bytes:
        with self.path.open("rb") as f:
            f.seek(self.start)
            return f.read(self.size)


def _object(data: bytes, start: int, end: int, place: str) -> dict[str, Any] | Drop:
    if end - start > packed.MAX_LINE_BYTES:
        return _too_long(end - start, place)
    try:
        return parse_json(data[start:end])
    except Fault as fault:
        return Drop(fault.reason, place, fault.detail)


def read_lines(path: Path, label: str) -> Iterator[Lines]:
    """The blocks of a file; the bytes that they stand for (`consumed`) add up to the file's."""
    cutter = _Cutter(path, label, keep=not is_plain(path))
    try:
        for piece, at in unpacked(path):
            if not cutter.start and not cutter.size and _SPREAD.match(piece[:4096]):
                raise UserError(
                    f"{path}: is not one JSON object a line; convert it (jq -c '.[]' FILE > FILE.jsonl)"
                )
            yield from cutter.push(piece, at)
    except Broken as e:
        place = f"{label}:{cutter.number + cutter.ended}"
        cutter.forget_open_line()
        yield cutter.cut(path.stat().st_size, Drop(e.reason, place, str(e)))
        return
    yield cutter.finish(path.stat().st_size)


class _Cutter:
    """Finds where the blocks of a stream of pieces begin and end; holds their bytes only if `keep`."""

    def __init__(self, path: Path, label: str, *, keep: bool) -> None:
        self._path, self._label, self._keep = path, label, keep
        self._held = bytearray()
        self._gone = 0  # bytes of the file before the block
        self._long = False  # inside a line that is over the limit
        self.start = self.size = self._whole = 0  # the block's place, its length, its length in whole lines
        self.number, self.ended = 1, 0  # the block's first line, how many have ended in it

    def push(self, piece: bytes, at: int) -> Iterator[Lines]:
        """Take a piece of the stream; `at` is where the file stands."""
        if self._long:
            end = piece.find(b"\n") + 1
            if not end:
                self.size += len(piece)
                return
            yield self._end_long_line(end, at)
            piece = piece[end:]
        end = piece.rfind(b"\n") + 1
        if end:
            self._whole = self.size + end
            self.ended += piece.count(b"\n")
        self.size += len(piece)
        if self._keep:
            self._held += piece
        if end and self.size >= BLOCK_BYTES:
            yield self.cut(at)
        elif self.size - self._whole > packed.MAX_LINE_BYTES:
            if self._whole:
                yield self.cut(at)
            self._held.clear()
            self._long = True

    def cut(self, at: int, fault: Drop | None = None) -> Lines:
        """The block of the whole lines so far."""
        data = bytes(memoryview(self._held)[: self._whole]) if self._keep else None
        consumed, self._gone = at - self._gone, at
        block = Lines(self._path, self._label, self.number, self.start, self._whole, data, fault, consumed)
        del self._held[: self._whole]
        self.start, self.size = self.start + self._whole, self.size - self._whole
        self.number, self.ended, self._whole = self.number + self.ended, 0, 0
        return block

    def finish(self, at: int) -> Lines:
        """The last block; the last line may lack its line end."""
        if self._long:
            return self._end_long_line(0, at)
        self._whole = self.size
        return self.cut(at)

    def forget_open_line(self) -> None:
        """Leave out a line whose end is lost."""
        if self._long:
            self._long, self.size = False, 0
        self.size = self._whole
        del self._held[self._whole :]

    def _end_long_line(self, end: int, at: int) -> Lines:
        self.size += end
        self._long, self._whole, self.ended = False, self.size, 1
        fault = _too_long(self.size - (end > 0), f"{self._label}:{self.number}")
        block = self.cut(at, fault)
        return Lines(self._path, self._label, block.number, block.start, 0, b"", fault, block.consumed)


def _too_long(size: int, place: str) -> Drop:
    limit = packed.MAX_LINE_BYTES >> 20
    return Drop("line_too_long", place, f"the line has {size >> 20} MiB, the limit is {limit} MiB; cut it")
