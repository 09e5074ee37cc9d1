"""The words of `data.source` → records: factbook, jsonl:PATH, text:PATH|FOLDER, hf:NAME[:split], ms:NAME.

Every source counts what it reads; one whose records are mostly faulty is a UserError (see `read`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from microlm.core.artifact import hash_file
from microlm.core.errors import UserError
from microlm.core.storage import is_remote, local_path
from microlm.text.read import Drop, Record
from microlm.text.sources import files, hub

FACTBOOK = "factbook"
KINDS = (FACTBOOK, "jsonl", "text", "hf", "ms")
MAX_EXAMPLES = 3
MAX_REASONS = 200  # a hostile corpus can hold a new wrong key on every line


@dataclass
class Tally:
    """What one step did: `read` = `kept` + every count in `dropped`, with a few examples a reason."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def keep(self) -> None:
        """Count one record that goes on."""
        self.read += 1
        self.kept += 1

    def drop(self, reason: str, example: str) -> None:
        """Count one record that ends here, and show the first few."""
        self.read += 1
        if reason not in self.dropped and len(self.dropped) >= MAX_REASONS:
            reason = reason.partition(" (")[0]
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(example)

    def check(self) -> None:
        """Our own invariant: nothing is lost uncounted."""
        assert self.read == self.kept + self.dropped.total(), "accepted + dropped = read"


@dataclass(frozen=True)
class Source:
    """A parsed word of `data.source`: its kind, its path or dataset name, and the split of a dataset."""

    word: str
    kind: str
    place: str = ""
    split: str = "train"

    @property
    def path(self) -> Path:
        """The local path that the word names."""
        return local_path(self.place)

    def size_bytes(self) -> int | None:
        """The bytes of the files that will be read, None for a dataset of a hub."""
        return sum(p.stat().st_size for p in self._files()) if self._files() else None

    def fingerprint(self) -> dict[str, str]:
        """File name → sha256 of all that is read, so that a changed file makes a new artifact."""
        if self.kind == FACTBOOK:
            return {}
        if self.kind in ("hf", "ms") and not self.path.exists():
            return {f"{self.kind}:{self.place}:{self.split}": "remote"}
        root = self.path
        named = {
            p.relative_to(root).as_posix() if root.is_dir() else p.name: hash_file(p) for p in self._files()
        }
        return {"kind": self.kind, "split": self.split, **named}

    def _files(self) -> list[Path]:
        if self.kind == "text":
            return [p for p in files.text_files(self.path) if p.is_file()]
        if self.path.is_dir():
            return sorted(p for p in self.path.rglob("*") if p.is_file()) if self.kind in ("hf", "ms") else []
        return [self.path] if self.path.is_file() else []


def parse(word: str) -> Source:
    """A word of `data.source` → Source; an unknown kind or an empty place is a UserError."""
    kind, _, place = word.partition(":")
    if kind not in KINDS or (kind == FACTBOOK) == bool(place):
        known = "factbook, jsonl:PATH, text:PATH|FOLDER, hf:owner/dataset[:split], ms:owner/dataset[:split]"
        raise UserError(f"data.source '{word}': is not one of {known}; choose one")
    if kind in ("jsonl", "text") and is_remote(place):
        raise UserError(f"data.source '{word}': is not on this machine; download the file first")
    if kind in ("jsonl", "text"):
        files.require_source(local_path(place), kind)
    if kind in ("hf", "ms"):
        name, _, split = place.partition(":")
        return Source(word, kind, name, split or "train")
    return Source(word, kind, place)


def hash_folder(folder: Path) -> str:
    """One sha256 over the names and bytes of all files under a folder."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        whole.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    return whole.hexdigest()


def read(
    source: Source, tally: Tally, strict: bool, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Record]:
    """The records of a user's source, in constant memory.

    Faults are counted in `tally`; with `strict` the first is a UserError with file and line. A source that is
    more than half dropped, or holds no record, is a UserError.
    """
    own = Tally()
    for record in _stream(source, advance):
        if not isinstance(record, Drop):
            own.keep()
            tally.keep()
            yield record
            continue
        if strict:
            raise UserError(
                f"{source.word}: {record.place}: {record.detail}; mend it, or set strict: false to drop it"
            )
        own.drop(record.reason, f"{record.place}: {record.detail}")
        tally.drop(record.reason, f"{record.place}: {record.detail}")
    own.check()
    if not own.read:
        raise UserError(f"{source.word}: holds no records; check that it is the right file")
    if 2 * own.kept < own.read:
        reason, count = own.dropped.most_common(1)[0]
        step = "rename the field" if reason.startswith("missing_field") else "mend the file"
        raise UserError(
            f"{source.word}: {own.read - own.kept} of {own.read} records cannot be used, most often {reason}"
            f" ({count} times, first {own.examples[reason][0]}); {step}"
        )


def _stream(source: Source, advance: Callable[[int], None]) -> Iterator[Record | Drop]:
    if source.kind == "jsonl":
        return files.read_jsonl(source.path, advance)
    if source.kind == "text":
        return files.read_text(source.path, advance)
    return hub.read_dataset(source.kind, source.place, source.split)
