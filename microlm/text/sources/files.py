"""Raw files of a user → records. Enters: JSONL, text or markdown (plain, gzip, zstd), or a folder of texts.

Leaves: records and drops in order, in constant memory; what makes the whole file unreadable is a UserError.
"""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from microlm.core.errors import UserError
from microlm.core.records import Document
from microlm.text.read import Drop, Record, main_key, parse_line

MAX_LINE_BYTES = 32 << 20  # a longer line is counted and thrown away piece by piece
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown")
_PACKED = (".gz", ".zst")
_PIECE = 1 << 16
_PACKED_PIECE = 1 << 10  # zstd can unfold a kilobyte into 32 MB, so feed it small ones
_FOREIGN = {
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1": "a Parquet file; convert it to JSONL first",
    b"BZh": "bzip2; unpack it, or pack it with gzip or zstd",
    b"\xfd7zXZ": "xz; unpack it, or pack it with gzip or zstd",
    b"%PDF": "a PDF; extract its text first",
    b"\xff\xfe": "UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
}
_SPREAD = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*\{|\[[ \t\r]*\n|\{[ \t\r]*\n)"
)  # a JSON array, or pretty-printed
_CONTROL = bytes(b for b in range(32) if b not in b"\t\n\r\f\x1b")

Advance = Callable[[int], None]


class Broken(Exception):
    """A packed stream that ends or fails in the middle; `.reason` is truncated_file or damaged_file."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_jsonl(path: Path, advance: Advance = lambda _: None) -> Iterator[Record | Drop]:
    """The records of a JSONL file, each fault a Drop. `advance` is told the bytes that went by."""
    expected = "text"
    for place, line in _lines(path, advance):
        if isinstance(line, Drop):
            yield line
            continue
        record = parse_line(line, place, expected)
        if not isinstance(record, Drop):
            expected = main_key(record)
        yield record


def read_text(path: Path, advance: Advance = lambda _: None) -> Iterator[Record | Drop]:
    """A text file (one document), or every text file under a folder in the order of their names."""
    files = text_files(path)
    if not files:
        raise UserError(f"{path}: holds no {', '.join(TEXT_SUFFIXES)} file; check the folder")
    for file in files:
        if file == path:
            yield _document(file, file.name, advance)
            continue
        name = file.relative_to(path).as_posix()
        try:
            yield _document(file, name, advance)
        except UserError as e:  # one bad file of many is a counted drop
            yield Drop("unreadable_file", name, str(e))


def text_files(path: Path) -> list[Path]:
    """The files that `text:PATH` reads: the file itself, or the texts under the folder, sorted."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in TEXT_SUFFIXES)


def require_file(path: Path, suffixes: tuple[str, ...]) -> None:
    """A UserError unless `path` is a file with a name that we read."""
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise UserError(f"{path}: is a directory, expected a file ({', '.join(suffixes)})")
    if _suffix(path) not in suffixes:
        known = ", ".join(suffixes)
        raise UserError(
            f"{path}: '{_suffix(path) or 'no extension'}' is not one of {known} (also .gz, .zst); convert it"
        )


def require_source(path: Path, kind: str) -> None:
    """A UserError unless a `jsonl:` or `text:` word names something that we read."""
    if kind == "text" and path.is_dir():
        return
    require_file(path, JSONL_SUFFIXES if kind == "jsonl" else TEXT_SUFFIXES)


def _suffix(path: Path) -> str:
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _document(path: Path, name: str, advance: Advance) -> Document | Drop:
    require_file(path, TEXT_SUFFIXES)
    held = bytearray()
    try:
        for piece in _unpacked(path, advance):
            held += piece
            if len(held) > MAX_LINE_BYTES:
                return Drop(
                    "line_too_long", name, f"the text is longer than {MAX_LINE_BYTES >> 20} MiB; cut it"
                )
    except Broken as e:
        return Drop(e.reason, name, str(e))
    if b"\0" in held:
        return Drop("nul_byte", name, "the text holds a NUL byte")
    try:
        text = held.decode("utf-8")
    except UnicodeDecodeError as e:
        return Drop("invalid_utf8", name, f"byte {e.start} is not UTF-8")
    return Document(text, name) if text.strip() else Drop("text_empty", name, "the file holds no text")


def _lines(path: Path, advance: Advance) -> Iterator[tuple[str, bytes | Drop]]:
    """`(name:number, line)`; a line over the limit and a broken end come as drops."""
    require_file(path, JSONL_SUFFIXES)
    held: list[bytes] = []
    size = 0
    number = 1
    try:
        for piece in _unpacked(path, advance):
            *ended, rest = piece.split(b"\n")
            for part in ended:
                place = f"{path.name}:{number}"
                yield place, _line(held, size + len(part), part, place)
                held, size, number = [], 0, number + 1
            held.append(rest)
            size += len(rest)
            if size > MAX_LINE_BYTES:
                held = []
    except Broken as e:
        yield f"{path.name}:{number}", Drop(e.reason, f"{path.name}:{number}", str(e))
        return
    if size:
        place = f"{path.name}:{number}"
        yield place, _line(held, size, b"", place)


def _line(held: list[bytes], size: int, last: bytes, place: str) -> bytes | Drop:
    if size > MAX_LINE_BYTES:
        limit = MAX_LINE_BYTES >> 20
        return Drop(
            "line_too_long", place, f"the line has {size >> 20} MiB, the limit is {limit} MiB; cut it"
        )
    return b"".join([*held, last]) if held else last


def _unpacked(path: Path, advance: Advance) -> Iterator[bytes]:
    """The file's bytes in pieces, unpacked, without byte-order mark; Broken where the packing breaks."""
    with _open(path) as f:
        head = f.read(4)
        f.seek(0)
        if not head:
            raise UserError(f"{path}: holds no records, the file is empty; check that it is the right file")
        if head[:2] == b"\x1f\x8b":
            pieces = _gunzip(f, advance)
        elif head == zstandard.FRAME_HEADER:
            pieces = _unzstd(f, advance)
        else:
            pieces = _plain(f, advance)
        first = next(pieces, b"")
        _require_text(path, first)
        yield first.removeprefix(codecs.BOM_UTF8)
        yield from pieces


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}); check the path and its permissions"
        ) from None


def _require_text(path: Path, head: bytes) -> None:
    """Refuse what is not text at all, and a JSON array, by its first bytes."""
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is {what}")
    sample = head[:4096]
    if len(sample.translate(None, _CONTROL)) < 0.93 * len(sample):  # of random bytes 0.895 are left
        raise UserError(f"{path}: looks like a binary file; expected UTF-8 text")
    if _suffix(path) in JSONL_SUFFIXES and _SPREAD.match(sample):
        raise UserError(f"{path}: is not one JSON object a line; convert it (jq -c '.[]' FILE > FILE.jsonl)")


def _plain(f: BinaryIO, advance: Advance) -> Iterator[bytes]:
    while piece := f.read(_PIECE):
        yield piece
        advance(len(piece))


def _gunzip(f: BinaryIO, advance: Advance) -> Iterator[bytes]:
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
        advance(len(piece))
    if started:
        if rest := unpacker.flush():
            yield rest
        if unpacker.eof:
            return
        raise Broken(
            "truncated_file", f"the gzip data ends in the middle at byte {f.tell()}; fetch the file again"
        )


def _unzstd(f: BinaryIO, advance: Advance) -> Iterator[bytes]:
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
                if out:
                    yield out
                if unpacker.eof:
                    data = unpacker.unused_data
                    unpacker = zstandard.ZstdDecompressor().decompressobj()
                    started = False
        advance(len(piece))
    if started:
        raise Broken(
            "truncated_file", f"the zstd data ends in the middle at byte {f.tell()}; fetch the file again"
        )
