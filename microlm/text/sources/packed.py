"""Bytes of a user's file, unpacked in constant memory. Enters: a path (plain, gzip, zstd). Leaves: pieces.

What is no text at all is a UserError; packing that breaks in the middle is `Broken`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from microlm.core.errors import UserError

MAX_LINE_BYTES = 32 << 20  # a longer line is counted and thrown away piece by piece
SUFFIXES = (".gz", ".zst")
_PIECE = 1 << 16
_LARGEST = 1 << 20
_PACKED_PIECE = 1 << 10  # zstd can unfold a kilobyte into 32 MB, so feed it small ones
_FOREIGN = {
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1": "a Parquet file; name it as parquet:PATH",
    b"BZh": "bzip2; unpack it, or pack it with gzip or zstd",
    b"\xfd7zXZ": "xz; unpack it, or pack it with gzip or zstd",
    b"%PDF": "a PDF; extract its text first",
    b"\xff\xfe": "UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
}
_CONTROL = bytes(b for b in range(32) if b not in b"\t\n\r\f\x1b")


class Broken(Exception):
    """A packed stream that ends or fails in the middle; `.reason` is truncated_file or damaged_file."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def is_plain(path: Path) -> bool:
    """Whether the file's bytes are its text; told by the bytes, not by the name."""
    with _open(path) as f:
        head = f.read(4)
    return head[:2] != b"\x1f\x8b" and head != zstandard.FRAME_HEADER


def unpacked(path: Path) -> Iterator[tuple[bytes, int]]:
    """`(piece, bytes of the file gone by)`, the pieces unpacked; Broken where the packing breaks."""
    with _open(path) as f:
        head = f.read(4)
        f.seek(0)
        if not head:
            raise UserError(f"{path}: holds no records, the file is empty; check that it is the right file")
        if head[:2] == b"\x1f\x8b":
            pieces = _gunzip(f)
        elif head == zstandard.FRAME_HEADER:
            pieces = _unzstd(f)
        else:
            pieces = iter(lambda: f.read(_PIECE), b"")
        first = True
        for piece in pieces:
            if first:
                _require_text(path, piece)
                first = False
            yield piece, f.tell()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}); check the path and its permissions"
        ) from None


def _require_text(path: Path, head: bytes) -> None:
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is {what}")
    sample = head[:4096]
    if len(sample.translate(None, _CONTROL)) < 0.93 * len(sample):  # of random bytes 0.895 are left
        raise UserError(f"{path}: looks like a binary file; expected UTF-8 text")


def _gunzip(f: BinaryIO) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(31)
    started = False  # inside a gzip member
    while piece := f.read(_PIECE):
        data = piece
        while data:
            try:
                out = unpacker.decompress(data, _PIECE)
            except zlib.error as e:
                raise Broken(
                    "damaged_file", f"the gzip data is damaged before byte {f.tell()} ({e})"
                ) from None
            started = True
            if out:
                yield out
            data = unpacker.unconsumed_tail
            if unpacker.eof:
                data = unpacker.unused_data.lstrip(b"\0")
                unpacker = zlib.decompressobj(31)
                started = False
    if started:
        if rest := unpacker.flush():
            yield rest
        if unpacker.eof:
            return
        raise Broken(
            "truncated_file", f"the gzip data ends in the middle at byte {f.tell()}; fetch the file again"
        )


def _unzstd(f: BinaryIO) -> Iterator[bytes]:
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    started = False  # inside a zstd frame
    while piece := f.read(_PIECE):
        for start in range(0, len(piece), _PACKED_PIECE):
            data = piece[start : start + _PACKED_PIECE]
            while data:
                try:
                    out = unpacker.decompress(data)
                except zstandard.ZstdError as e:
                    raise Broken(
                        "damaged_file", f"the zstd data is damaged before byte {f.tell()} ({e})"
                    ) from None
                started, data = True, b""
                for at in range(0, len(out), _LARGEST):
                    yield out[at : at + _LARGEST]
                if unpacker.eof:
                    data = unpacker.unused_data
                    unpacker = zstandard.ZstdDecompressor().decompressobj()
                    started = False
    if started:
        raise Broken(
            "truncated_file", f"the zstd data ends in the middle at byte {f.tell()}; fetch the file again"
        )
