"""The files that a word of `data.source` names: one file, all of a folder, or a glob; and texts read whole.

Leaves: `Texts`, a block of files of which each is one document.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.core.errors import UserError
from microlm.text.read import Drop
from microlm.text.sources import packed
from microlm.text.sources.packed import Broken, unpacked

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".text", ".md", ".markdown"),
    "markdown": (".md", ".markdown"),
}
"""What a kind of source reads, also packed with gzip or zstd."""
BLOCK_BYTES, BLOCK_FILES = 8 << 20, 1000
_GLOB = re.compile(r"[*?\[]")
_FRONT_MATTER = re.compile(r"(---|\+\+\+)[ \t]*\r?\n(?:.*?\r?\n)?\1[ \t]*(?:\r?\n|$)", re.DOTALL)

Named = tuple[Path, str]
"""A file, and its name in a record's `source`."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Files of which each is one document; `alone` if the user named just this one."""

    files: tuple[Named, ...]
    alone: bool
    markdown: bool
    consumed: int
    expected: str = "text"
    task: str = ""

    def objects(self) -> Iterator[tuple[str, dict[str, Any] | Drop]]:
        """`(name, {"text": …})`, or the drop of a file that is no text; alone, that is a UserError."""
        for path, label in self.files:
            try:
                yield label, self._object(path, label)
            except UserError as e:
                if self.alone:
                    raise
                yield label, Drop("unreadable_file", label, str(e))

    def _object(self, path: Path, label: str) -> dict[str, Any] | Drop:
        held = bytearray()
        try:
            for piece, _ in unpacked(path):
                held += piece
                if len(held) > packed.MAX_LINE_BYTES:
                    limit = packed.MAX_LINE_BYTES >> 20
                    return Drop("line_too_long", label, f"the text is longer than {limit} MiB; cut it")
        except Broken as e:
            return Drop(e.reason, label, str(e))
        if b"\0" in held:
            return Drop("nul_byte", label, "the text holds a NUL byte")
        try:
            text = bytes(held).removeprefix(codecs.BOM_UTF8).decode("utf-8")
        except UnicodeDecodeError as e:
            return Drop("invalid_utf8", label, f"byte {e.start} is not UTF-8")
        if self.markdown and (front := _FRONT_MATTER.match(text)):
            text = text[front.end() :]
        return {"text": text} if text.strip() else Drop("text_empty", label, "the file holds no text")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """One file of many that cannot be read: a single drop."""

    label: str
    why: str
    consumed: int
    expected: str = "text"
    task: str = ""

    def objects(self) -> Iterator[tuple[str, dict[str, Any] | Drop]]:
        """The drop."""
        yield self.label, Drop("unreadable_file", self.label, self.why)


def read_texts(files: list[Named], *, alone: bool, markdown: bool) -> Iterator[Texts]:
    """The files in blocks, each as large as one of lines."""
    group: list[Named] = []
    size = 0
    for path, label in files:
        group.append((path, label))
        size += path.stat().st_size
        if size >= BLOCK_BYTES or len(group) >= BLOCK_FILES:
            yield Texts(tuple(group), alone, markdown, size)
            group, size = [], 0
    if group:
        yield Texts(tuple(group), alone, markdown, size)


def find_files(path: Path, kind: str) -> list[Named]:
    """The files that `kind:path` reads, in the order of their names; hidden ones are left alone."""
    if path.is_file():
        return [(path, path.name)]
    root, pattern = (path, "**/*") if path.is_dir() else _split_glob(path)
    found = []
    for file in root.glob(pattern) if pattern else ():
        name = file.relative_to(root)
        if not any(part.startswith(".") for part in name.parts) and file.is_file():
            found.append((file, name.as_posix()))
    return sorted((f for f in found if suffix(f[0]) in SUFFIXES[kind]), key=lambda f: f[1])


def require_source(path: Path, kind: str) -> None:
    """A UserError unless `kind:path` names something that we read."""
    if path.exists() and not path.is_dir():
        if suffix(path) not in SUFFIXES[kind]:
            raise UserError(
                f"{path}: '{suffix(path) or 'no extension'}' is not one of {', '.join(SUFFIXES[kind])}"
                f" (also .gz, .zst); {_advice(path)}"
            )
    elif not path.exists() and not _split_glob(path)[1]:
        raise UserError(f"{path}: no such file; check the path")


def require_files(path: Path, kind: str) -> list[Named]:
    """`find_files`, or a UserError when there is none."""
    found = find_files(path, kind)
    if not found:
        what = "folder" if path.is_dir() else "pattern"
        raise UserError(f"{path}: holds no {', '.join(SUFFIXES[kind])} file; check the {what}")
    return found


def suffix(path: Path) -> str:
    """The ending that says what a file is: `.jsonl` of `a.jsonl.zst`."""
    name = path.name.lower()
    for ending in packed.SUFFIXES:
        name = name.removesuffix(ending)
    return Path(name).suffix


def _advice(path: Path) -> str:
    kind = next((k for k in ("parquet", "csv", "jsonl", "text") if suffix(path) in SUFFIXES[k]), None)
    return f"name it as {kind}:PATH" if kind else "convert it"


def _split_glob(path: Path) -> tuple[Path, str]:
    """The folder before the first wildcard, and the pattern; an empty pattern when there is no wildcard."""
    for at, part in enumerate(path.parts):
        if _GLOB.search(part):
            return Path(*path.parts[:at]), "/".join(path.parts[at:])
    return path, ""
