"""The files that an audit reads. Enters: the words of the command line. Leaves: parts, each of one split.

A word is a data artifact, a folder of that layout, a file, or `train=FILE`, `validation=FILE`, `test=FILE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.core.manifest import open_artifact
from microlm.core.recipe import nearest
from microlm.text import sources
from microlm.text.sources import Source, files
from microlm.text.split import KINDS, Split

ORDER: tuple[Split, ...] = ("train", "validation", "test")
QUESTIONS = "questions"
FOLDERS = (*KINDS, QUESTIONS)
"""What of an artifact is audited; `chats` are the beginnings of held-out conversations."""


@dataclass(frozen=True)
class Part:
    """One file: `kind` is its folder, empty for a file that was named by itself."""

    kind: str
    split: Split
    source: Source

    @property
    def name(self) -> str:
        """The part in words."""
        return f"{self.kind}/{self.split}" if self.kind else self.split

    def label(self, place: str) -> str:
        """`file:line` with the folder."""
        return f"{self.kind}/{place}" if self.kind else place


@dataclass(frozen=True)
class Found:
    """The parts by kind and split; the folder they come from, if one; the files that are left alone."""

    parts: tuple[Part, ...]
    root: Path | None
    left_out: tuple[str, ...]


def find(words: Sequence[str]) -> Found:
    """The parts that the words name, or a UserError."""
    if len(words) == 1 and _is_folder(words[0]):
        return _folder(words[0])
    parts = [_file(word) for word in words]
    if not parts:
        raise UserError("nothing to read; name a data artifact, a folder, or train=FILE validation=FILE")
    return Found(tuple(sorted(parts, key=_place)), None, ())


def choose(found: Found, kind: str | None, split: str | None) -> Part:
    """The part of a kind and split; None takes the first that is there."""
    for name, wanted in (("kind", kind), ("split", split)):
        known = [p.kind if name == "kind" else p.split for p in found.parts]
        if wanted is not None and wanted not in known:
            raise UserError(f"--{name} {wanted}: is not there; {nearest(wanted, {k for k in known if k})}")
    for part in found.parts:
        if kind in (None, part.kind) and split in (None, part.split):
            return part
    there = ", ".join(p.name for p in found.parts)
    raise UserError(f"--kind {kind} --split {split}: there is no such part; there are {there}")


def _is_folder(word: str) -> bool:
    return storage.is_remote(word) or storage.local_path(word).is_dir()


def _folder(word: str) -> Found:
    artifact = storage.exists(storage.join(word, storage.MANIFEST))
    root = open_artifact(word).path if artifact else storage.local_path(word)
    lines = files.SUFFIXES["jsonl"]
    there = [p for p in sorted(root.glob("*/*")) if p.is_file() and files.suffix(p) in lines]
    parts, left_out = [], []
    for path in there:
        split = path.name.partition(".")[0]
        if path.parent.name in FOLDERS and split in ORDER and path.stat().st_size:
            parts.append(Part(path.parent.name, _split(split), sources.parse(f"jsonl:{path}")))
        elif path.parent.name != "logs" and path.stat().st_size:
            left_out.append(path.relative_to(root).as_posix())
    if not parts:
        raise UserError(
            f"{word}: holds no documents/train.jsonl or the like; name a data artifact, or train=FILE"
        )
    return Found(tuple(sorted(parts, key=_place)), root, tuple(left_out))


def _file(word: str) -> Part:
    name, equals, place = word.partition("=")
    if not equals or "/" in name or storage.local_path(word).exists():
        name, place = "train", word
    if name not in ORDER:
        raise UserError(f"{word}: '{name}' is no split; {nearest(name, ORDER)}")
    kind = next((k for k in sources.KINDS if place.startswith(f"{k}:")), None)
    if kind is None:
        ending = files.suffix(Path(place))
        kind = next((k for k, endings in files.SUFFIXES.items() if ending in endings), "jsonl")
        place = f"{kind}:{place}"
    if kind == sources.FACTBOOK:
        raise UserError(f"{word}: the factbook has no file; name what 'microlm data prepare' wrote")
    return Part("", _split(name), sources.parse(place))


def _split(word: str) -> Split:
    return next(split for split in ORDER if split == word)


def _place(part: Part) -> tuple[int, int, str]:
    kinds: Iterable[str] = ("", *FOLDERS)
    return list(kinds).index(part.kind), ORDER.index(part.split), part.source.word
