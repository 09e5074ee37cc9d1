"""The words of `data.source` → records: factbook, arithmetic:COUNT, jsonl:PATH, text:PATH, hf:NAME …

A word may name the task of its conversations: `law=jsonl:PATH`.
`blocks` cuts a source, `read_block` reads a block in any process, `read` does both and counts.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from microlm.core.artifact import hash_file
from microlm.core.errors import UserError
from microlm.core.recipe import nearest
from microlm.core.storage import is_remote, local_path
from microlm.text.read import Drop, Record
from microlm.text.sources import arithmetic, files, hub
from microlm.text.sources.blocks import Block, Format, expecting, format_of, read_block
from microlm.text.sources.jsonl import read_lines
from microlm.text.sources.tables import read_csv, read_parquet

__all__ = [
    "FACTBOOK",
    "Block",
    "Format",
    "Source",
    "Tally",
    "announce",
    "blocks",
    "detect",
    "hash_folder",
    "is_task",
    "is_word",
    "parse",
    "read",
    "read_block",
    "require_usable",
    "strict_error",
]
FACTBOOK = "factbook"
HUBS = ("hf", "ms")
KINDS = (FACTBOOK, arithmetic.TASK, *files.SUFFIXES, *HUBS)
_TASK = re.compile(r"[\w-]{1,64}")
MAX_EXAMPLES = 3
MAX_REASONS = 200  # a hostile corpus can hold a new wrong key on every line


@dataclass
class Tally:
    """What one step did: `read` = `kept` + every count in `dropped`, with a few examples a reason."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    licences: set[str] = field(default_factory=set)  # of what was kept, where the step asks for them

    def keep(self, licence: str = "") -> None:
        """Count one record that goes on."""
        self.read += 1
        self.kept += 1
        if licence:
            self.licences.add(licence)

    def drop(self, reason: str, example: str) -> None:
        """Count one record that ends here, and show the first few."""
        self.read += 1
        reason = self._name(reason)
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(example)

    def add(self, other: Tally) -> None:
        """Put the counts of what came behind to these."""
        self.read += other.read
        self.kept += other.kept
        self.licences |= other.licences
        for reason, count in other.dropped.items():
            name = self._name(reason)
            self.dropped[name] += count
            shown = self.examples.setdefault(name, [])
            shown += other.examples[reason][: MAX_EXAMPLES - len(shown)]

    def to_json(self) -> dict[str, Any]:
        """The counts as plain values."""
        counts = {"read": self.read, "kept": self.kept, "dropped": self.dropped, "examples": self.examples}
        return counts | ({"licences": sorted(self.licences)} if self.licences else {})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tally:
        """What `to_json` gave."""
        licences = set(data.get("licences", ()))
        return cls(data["read"], data["kept"], Counter(data["dropped"]), data["examples"], licences)

    def _name(self, reason: str) -> str:
        """The reason, cut short when there are too many."""
        full = reason not in self.dropped and len(self.dropped) >= MAX_REASONS
        return reason.partition(" (")[0] if full else reason

    def check(self) -> None:
        """Our own invariant: nothing is lost uncounted."""
        assert self.read == self.kept + self.dropped.total(), "accepted + dropped = read"


@dataclass(frozen=True)
class Source:
    """A parsed word of `data.source`: its kind, its path or dataset, the task that it names, if one."""

    word: str
    kind: str
    place: str = ""
    dataset: hub.Dataset | None = None
    task: str = ""

    @property
    def path(self) -> Path:
        """The local path that the word names."""
        return local_path(self.dataset.name if self.dataset else self.place)

    @property
    def split(self) -> str:
        """The split of a dataset; of files there is one."""
        return self.dataset.split if self.dataset else "train"

    def size_bytes(self) -> int | None:
        """The bytes of the files that will be read, None where there are no files."""
        if self.dataset or self.kind == arithmetic.TASK:
            return None
        return sum(path.stat().st_size for path, _ in self._files())

    def fingerprint(self) -> dict[str, str]:
        """The task that is named, file name → sha256 of all that is read: a change makes a new artifact."""
        return ({"task": self.task} if self.task else {}) | self._content()

    def _content(self) -> dict[str, str]:
        if self.kind == FACTBOOK:
            return {}
        if self.kind == arithmetic.TASK:
            return {"problems": self.place, "wording": arithmetic.fingerprint()}
        if self.dataset and not self.dataset.is_local:
            name = str(replace(self.dataset, revision=""))
            return {"dataset": name, "revision": hub.pinned(self.dataset)}
        return {"kind": self.kind, "split": self.split} | {name: hash_file(p) for p, name in self._files()}

    def _files(self) -> list[files.Named]:
        if not self.dataset:
            return files.find_files(self.path, self.kind)
        root = self.path
        return [(p, p.relative_to(root).as_posix()) for p in sorted(root.rglob("*")) if p.is_file()]


def parse(word: str) -> Source:
    """A word of `data.source` → Source; an unknown kind, an empty place, a bad name is a UserError."""
    named, _, place = word.partition(":")
    task, _, kind = named.rpartition("=")
    if kind not in KINDS or (kind == FACTBOOK) == bool(place):
        known = ", ".join([FACTBOOK, f"{arithmetic.TASK}:COUNT", *(f"{k}:PATH" for k in files.SUFFIXES)])
        hubs = " or ".join(f"{k}:owner/dataset[:split][@revision]" for k in HUBS)
        raise UserError(
            f"data.source '{word}': is not one of {known}, {hubs}; {nearest(kind, KINDS)} "
            "(NAME= before it names the task of its conversations)"
        )
    if ("=" in named and not is_task(task)) or (task and kind == FACTBOOK):
        raise UserError(
            f"data.source '{word}': {task!r} cannot name a task; use at most 64 letters, digits, '_', '-', "
            "not 'documents'; the factbook names its own"
        )
    if kind in HUBS:
        return Source(word, kind, place, hub.parse_dataset(kind, place), task)
    if kind == arithmetic.TASK:
        arithmetic.parse(place)
    elif kind != FACTBOOK:
        if is_remote(place):
            raise UserError(f"data.source '{word}': is not on this machine; download the file first")
        files.require_source(local_path(place), kind)
    return Source(word, kind, place, task=task)


def is_task(name: str) -> bool:
    """Whether a task may be called so: it becomes the name of a token set's files."""
    return bool(_TASK.fullmatch(name)) and name != "documents"


def is_word(word: str) -> bool:
    """Whether a text is a word of `data.source`, not a file's name."""
    return word.partition(":")[0].rpartition("=")[2] in KINDS


def hash_folder(folder: Path) -> str:
    """One sha256 over the names and bytes of all files under a folder."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        whole.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    return whole.hexdigest()


def blocks(source: Source) -> Iterator[Block]:
    """A source in blocks of about 8 MB, in order; their `consumed` bytes add up to `size_bytes`.

    They know the task that the source names.
    """
    for block in _blocks(source):
        yield replace(block, task=source.task) if source.task else block


def _blocks(source: Source) -> Iterator[Block]:
    if source.kind == arithmetic.TASK:
        yield from arithmetic.blocks(*arithmetic.parse(source.place))
        return
    if source.dataset:
        yield from expecting(hub.read_dataset(source.dataset))
        return
    found = files.require_files(source.path, source.kind)
    alone = source.path.is_file()
    if source.kind in ("text", "markdown"):
        yield from files.read_texts(found, alone=alone, markdown=source.kind == "markdown")
        return
    for path, label in found:
        try:
            yield from _file_blocks(source.kind, path, label)
        except UserError as e:
            if alone:
                raise
            yield files.Unreadable(
                label, str(e), path.stat().st_size
            )  # one bad file of many is a counted drop


def _file_blocks(kind: str, path: Path, label: str) -> Iterator[Block]:
    if kind == "jsonl":
        return expecting(read_lines(path, label))
    return expecting(read_csv(path, label)) if kind == "csv" else expecting(read_parquet(path, label))


def detect(source: Source) -> Format:
    """What the first 200 records of a user's source are."""
    return format_of(itertools.chain.from_iterable(block.objects() for block in blocks(source)))


def announce(source: Source) -> None:
    """Say on stderr what was found in a user's source."""
    sys.stderr.write(f"data {source.word}: {detect(source)}\n")


def read(
    source: Source, tally: Tally, strict: bool, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Record]:
    """The records of a user's source, in constant memory.

    Faults are counted in `tally`; with `strict` the first is a UserError with file and line. A source that is
    more than half dropped, or holds no record, is a UserError.
    """
    own = Tally()
    for block in blocks(source):
        for record in read_block(block):
            if not isinstance(record, Drop):
                own.keep()
                tally.keep()
                yield record
                continue
            if strict:
                raise strict_error(source, record)
            own.drop(record.reason, f"{record.place}: {record.detail}")
            tally.drop(record.reason, f"{record.place}: {record.detail}")
        advance(block.consumed)
    own.check()
    require_usable(source, own)


def strict_error(source: Source, drop: Drop) -> UserError:
    """What a fault is when none is allowed."""
    return UserError(f"{source.word}: {drop.place}: {drop.detail}; mend it, or set strict: false to drop it")


def require_usable(source: Source, tally: Tally) -> None:
    """A UserError when a source held no record, or more than half of them were dropped."""
    if not tally.read:
        raise UserError(f"{source.word}: holds no records; check that it is the right file")
    if 2 * tally.kept < tally.read:
        reason, count = tally.dropped.most_common(1)[0]
        step = "rename the field" if reason.startswith("missing_field") else "mend the file"
        raise UserError(
            f"{source.word}: {tally.read - tally.kept} of {tally.read} records cannot be used, most often"
            f" {reason} ({count} times, first {tally.examples[reason][0]}); {step}"
        )
