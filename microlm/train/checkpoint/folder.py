"""A folder that is there whole or not at all, and that knows when a byte of it has changed.

Enters: what fills it. Leaves: the files, and `checkpoint.json` (last) with bytes and sha256 of each, sealed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from microlm.core import storage
from microlm.core.manifest import CHECKPOINT, hash_file, seal

INDEX = CHECKPOINT
FORMAT = 2
PART = ".part"


class Damaged(Exception):
    """A file of a checkpoint is missing, or not as it was written; the sentence names it."""


def write(folder: Path, fill: Callable[[Path], None], head: Mapping[str, Any]) -> None:
    """Let `fill` write into a folder of another name, sync and hash what it wrote, add the index, rename."""
    part = folder.with_name(folder.name + PART)
    with storage.explain_write(folder):
        discard(part)
        part.mkdir(parents=True)
        try:
            fill(part)
            files = [_entry(path) for path in sorted(part.iterdir())]
            index = {"format": FORMAT, **head, "files": files}
            index["seal"] = seal(index)
            storage.write_atomic(part / INDEX, (json.dumps(index, indent=1) + "\n").encode())
            if folder.exists():
                discard(folder)
            part.rename(folder)
            storage.sync_folder(folder.parent)
        except Exception:
            shutil.rmtree(part, ignore_errors=True)
            raise


def read(folder: Path) -> dict[str, Any]:
    """The index of a folder whose every byte is as it was written; else `Damaged`."""
    place = folder / INDEX
    try:
        index = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise Damaged(f"{place}: cannot be read ({type(e).__name__})") from None
    if not isinstance(index, dict) or index.get("seal") != seal(index):
        raise Damaged(f"{place}: changed since it was written")
    if index["format"] != FORMAT:
        raise Damaged(f"{place}: format {index['format']}, this version reads {FORMAT}")
    for entry in index["files"]:
        path = folder / entry["path"]
        try:
            same = path.stat().st_size == entry["bytes"] and hash_file(path) == entry["sha256"]
        except OSError as e:
            raise Damaged(f"{path}: cannot be read ({e.strerror})") from None
        if not same:
            raise Damaged(f"{path}: changed since it was written")
    return index


def discard(folder: Path) -> None:
    """Delete a folder; cut off in the middle, it leaves no half of it under the old name."""
    if not folder.exists():
        return
    with storage.explain_write(folder):
        if not folder.name.endswith(PART):
            gone = folder.with_name(folder.name + ".old" + PART)
            discard(gone)
            folder = folder.rename(gone)
            storage.sync_folder(folder.parent)
        shutil.rmtree(folder)


def sweep(parent: Path) -> None:
    """Delete what a crash left half written or half deleted."""
    for rest in parent.glob("*" + PART):
        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as f:
        os.fsync(f.fileno())
    return {"path": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)}
