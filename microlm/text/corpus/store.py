"""Refined records on disk: `NNNNN.payload` (bytes) and `NNNNN.index.npy` (one Entry a record, by digest).

A block whose `NNNNN.json` is there is whole. All else is read through slices of equal digest range, so that
memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microlm.core import storage
from microlm.text.split import KINDS

ENTRY = np.dtype(
    [
        ("hi", "<u8"),  # the digest's first eight bytes, so that numbers sort as bytes do
        ("lo", "<u8"),
        ("tie", "<u8"),  # of the whole record: chooses between records that say the same at equal length
        ("offset", "<u8"),
        ("size", "<u4"),  # of the text, or of the JSON line of a record that is no document
        ("meta", "<u4"),  # of the JSON behind a document's text: source and licence
        ("chars", "<u4"),
        ("kind", "u1"),
        ("composed", "u1"),  # by us, for training
        ("changed", "u1"),  # lies in NNNNN.changed, not in NNNNN.payload
    ]
)
KEPT, EXACT, LINES, NEAR = range(4)
"""States of a record: kept, or why it is not; what holds held-out texts is found while it is written."""
OPEN_FILES = 64
SLICE_BYTES = 8 << 20  # of entries that are looked at together
DOCUMENTS = KINDS.index("documents")
Entries = NDArray[np.void]
Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]


def split_digest(digest: bytes) -> tuple[int, int]:
    """The two numbers of a digest of 16 bytes."""
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def join_digest(hi: int, lo: int) -> bytes:
    """The digest of two numbers."""
    return int(hi).to_bytes(8, "big") + int(lo).to_bytes(8, "big")


@dataclass
class BlockWriter:
    """Collects the records of one block; `finish` makes it exist."""

    folder: Path
    number: int
    _rows: list[tuple[int, ...]] = field(default_factory=list)
    _pieces: list[bytes] = field(default_factory=list)
    _offset: int = 0

    def put(self, kind: tuple[int, int], digest: bytes, body: bytes, meta: bytes, chars: int) -> None:
        """Add a record; `kind` is its number and whether we composed it."""
        hi, lo = split_digest(digest)
        tie = hashlib.blake2b(body, digest_size=8)
        tie.update(meta)
        self._rows.append(
            (hi, lo, int.from_bytes(tie.digest(), "big"), self._offset, len(body), len(meta), chars, *kind, 0)
        )
        self._pieces += [body, meta]
        self._offset += len(body) + len(meta)

    def finish(self, report: dict[str, Any]) -> None:
        """Write payload, index and, last, the report that marks the block as whole."""
        stem = self.folder / f"{self.number:05d}"
        with storage.explain_write(stem):
            stem.with_suffix(".json").unlink(missing_ok=True)  # of another block that had this number
            with stem.with_suffix(".payload").open("wb") as f:
                f.writelines(self._pieces)
            entries = np.array(self._rows, dtype=ENTRY)
            save_array(stem.with_suffix(".index.npy"), entries[by_digest(entries)])
            part = stem.with_suffix(".json.part")
            whole = {"sizes": _sizes(stem), **report}
            part.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
            part.replace(stem.with_suffix(".json"))


def save_array(path: Path, array: NDArray[Any]) -> None:
    """`np.save`, except that a full disk is an OSError with its number: numpy's own writing forgets it."""
    with storage.explain_write(path), path.open("wb") as f:
        np.lib.format.write_array(SimpleNamespace(write=f.write), array, allow_pickle=False)


def by_digest(entries: Entries) -> Numbers:
    """The order of entries by what they say."""
    return np.lexsort((entries["tie"], entries["lo"], entries["hi"]))


def finished(folder: Path, number: int) -> Any | None:
    """The report of a block that an earlier attempt finished.

    Nothing waits for the disk: a machine that lost its power may lack what a report speaks of, or the report.
    """
    stem = folder / f"{number:05d}"
    try:
        report = json.loads(stem.with_suffix(".json").read_bytes())
        return report if report.get("sizes") == _sizes(stem) else None
    except (FileNotFoundError, ValueError):
        return None


def _sizes(stem: Path) -> list[int]:
    """The bytes of payload and index."""
    return [stem.with_suffix(suffix).stat().st_size for suffix in (".payload", ".index.npy")]


def ranges(paths: Sequence[Path], key: str, size: int) -> Iterator[Entries]:
    """The rows of many sorted arrays by range of `key`, about `size` bytes a range; equal keys come together.

    One file is open at a time: there may be more of them than a process may open.
    """
    pieces = max(1, -(-sum(path.stat().st_size for path in paths) // size))
    for piece in range(pieces):
        parts = []
        for path in paths:
            array = np.load(path, mmap_mode="r")
            parts.append(np.array(array[within(array[key], piece, pieces)]))
        if parts:
            yield np.concatenate(parts)


def within(keys: NDArray[np.uint64], piece: int, pieces: int) -> slice:
    """Where the sorted keys of one of `pieces` equal ranges of 64 bits lie."""
    low, high = ((p << 64) // pieces for p in (piece, piece + 1))
    start = int(np.searchsorted(keys, np.uint64(low)))
    return slice(start, len(keys) if high >> 64 else int(np.searchsorted(keys, np.uint64(high))))


class Store:
    """The blocks of a folder, by number."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def entries(self, number: int) -> Entries:
        """The index of a block, mapped."""
        path = self.folder / f"{number:05d}.work.npy"
        found: Entries = np.load(
            path if path.exists() else path.with_suffix("").with_suffix(".index.npy"), mmap_mode="r"
        )
        return found

    def reset(self) -> None:
        """Forget all but what the first pass wrote."""
        for number in range(self.count):
            for suffix in ("state.npy", "work.npy", "changed"):
                (self.folder / f"{number:05d}.{suffix}").unlink(missing_ok=True)

    def state(self, number: int) -> NDArray[np.uint8]:
        """The state of every record of a block."""
        path = self.folder / f"{number:05d}.state.npy"
        if path.exists():
            found: NDArray[np.uint8] = np.load(path)
            return found
        return np.full(len(self.entries(number)), KEPT, dtype=np.uint8)

    def set_state(self, number: int, state: NDArray[np.uint8]) -> None:
        """Remember the states of a block."""
        self._save(f"{number:05d}.state.npy", state)

    def documents(self, number: int) -> tuple[Bytes, Numbers, Numbers, Numbers]:
        """The bytes of a block; of its kept documents the rows, where in the bytes each begins, its size."""
        entries = self.entries(number)
        rows = np.flatnonzero((self.state(number) == KEPT) & (entries["kind"] == DOCUMENTS))
        starts, sizes, changed = (
            entries[name][rows].astype(np.int64) for name in ("offset", "size", "changed")
        )
        suffixes = ("payload", "changed") if changed.any() else ("payload",)
        files = [self.folder / f"{number:05d}.{suffix}" for suffix in suffixes]
        ends = np.cumsum([path.stat().st_size for path in files])
        text = np.empty(ends[-1], dtype=np.uint8)
        for path, end in zip(files, ends.tolist(), strict=True):
            with path.open("rb") as f:
                f.readinto(text[end - path.stat().st_size : end].data)
        return text, rows, starts + changed * ends[0], sizes

    def set_entries(self, number: int, entries: Entries, state: NDArray[np.uint8]) -> None:
        """Put changed entries and their states in the place of the old ones."""
        order = by_digest(entries)
        self._save(f"{number:05d}.work.npy", entries[order])
        self.set_state(number, state[order])

    def _save(self, name: str, array: NDArray[Any]) -> None:
        part = self.folder / f"{name}.part.npy"
        save_array(part, array)
        part.replace(self.folder / name)

    def kept(self, piece: int, pieces: int) -> tuple[Numbers, Numbers, Entries]:
        """(block, row, entry) of the kept records of one of `pieces` ranges of the digest."""
        blocks, rows, found = [], [], [np.zeros(0, dtype=ENTRY)]
        for number in range(self.count):
            entries = self.entries(number)
            here = within(entries["hi"], piece, pieces)
            rows.append(here.start + np.flatnonzero(self.state(number)[here] == KEPT))
            blocks.append(np.full(len(rows[-1]), number))
            found.append(entries[rows[-1]])
        nothing = np.zeros(0, dtype=np.int64)
        return np.concatenate([nothing, *blocks]), np.concatenate([nothing, *rows]), np.concatenate(found)

    def pieces(self) -> int:
        """Into how many ranges of the digest the index is looked at."""
        total = sum(len(self.entries(n)) for n in range(self.count)) * ENTRY.itemsize
        return max(1, -(-total // SLICE_BYTES))


class Reader:
    """Reads payloads; keeps the block's files open until it is closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[int, int], int] = {}  # the one opened first is closed first

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._files.values():
            os.close(handle)

    def body(self, block: int, entry: Any) -> bytes:
        """The text of a document in UTF-8, or the JSON line of another record."""
        return self._read(block, entry, int(entry["size"]))

    def both(self, block: int, entry: Any) -> tuple[bytes, bytes]:
        """Body and meta."""
        size = int(entry["size"])
        found = self._read(block, entry, size + int(entry["meta"]))
        return found[:size], found[size:]

    def all(self, blocks: Numbers, entries: Entries) -> list[tuple[bytes, bytes]]:
        """`both` of all entries, in their order; read block by block."""
        found = [(b"", b"")] * len(entries)
        for at in np.lexsort((entries["offset"], blocks)).tolist():
            found[at] = self.both(int(blocks[at]), entries[at])
        return found

    def _file(self, block: int, entry: Any) -> int:
        key = block, int(entry["changed"])
        if key not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            suffix = "changed" if key[1] else "payload"
            self._files[key] = os.open(self._folder / f"{block:05d}.{suffix}", os.O_RDONLY)
        return self._files[key]

    def _read(self, block: int, entry: Any, size: int) -> bytes:
        found = os.pread(self._file(block, entry), size, int(entry["offset"]))
        assert len(found) == size, "a payload is as long as its index says"
        return found
