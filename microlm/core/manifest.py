"""The reading side of an artifact: its manifest, its files, whether they still agree.

Enters: a directory or URL. Leaves: an `Artifact`, or a sentence that says what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from microlm.core import storage
from microlm.core.errors import UserError

FORMAT = 1
MANIFEST = storage.MANIFEST
CHECKPOINT = "checkpoint.json"  # of which step and validation loss the weights beside it are
Kind = Literal[
    "data", "tokenizer", "shards", "model", "adapter", "predictions", "scores", "verdict", "report"
]
_AGAIN = "remove the folder and make the artifact again"


@dataclass(frozen=True)
class Artifact:
    """A finished stage directory. `path` is local (a cached copy when the place is remote)."""

    url: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The hash of what was asked for."""
        return str(self.manifest["key"])

    @property
    def digest(self) -> str:
        """The hash of the payload: names the artifact, equal for equal runs."""
        return str(self.manifest["digest"])

    @property
    def kind(self) -> str:
        """What it holds: data, tokenizer, shards, model, adapter …"""
        return str(self.manifest["kind"])

    @property
    def which(self) -> dict[str, Any]:
        """`checkpoint`: which one of its model this is; nothing of a whole artifact."""
        return {k: v for k, v in self.manifest.items() if k == "checkpoint"}

    def file(self, name: str) -> Path:
        """The path of a file in it; a missing one is an error that names it."""
        path = self.path / name
        if not path.exists():
            raise UserError(f"{self.url}: holds no '{name}' (kind {self.kind}); is this the right artifact?")
        return path

    def json(self, name: str) -> Any:
        """A JSON file in it."""
        return json.loads(self.file(name).read_bytes())


def find(url: str) -> Artifact | None:
    """The artifact at `url`, or None when there is no manifest."""
    if not storage.exists(storage.join(url, MANIFEST)):
        return _checkpoint(url)
    return open_artifact(url)


def is_signed(url: str) -> bool:
    """Whether there is a manifest, sound or not, or a checkpoint that one speaks of."""
    try:
        return storage.exists(storage.join(url, MANIFEST)) or _checkpoint(url) is not None
    except UserError:  # the manifest that speaks of it is damaged: who opens it is told
        return True


def open_artifact(url: str) -> Artifact:
    """The finished artifact at `url`; an error sentence when there is none or its format is unknown.

    A checkpoint that a trained model keeps (`runs/a/sft/best`) is an artifact too, by its model's manifest.
    """
    manifest_url = storage.join(url, MANIFEST)
    try:
        manifest = json.loads(storage.read_bytes(manifest_url))
    except (FileNotFoundError, NotADirectoryError):
        if kept := _checkpoint(url):
            return kept
        unfinished = storage.exists(url.rstrip("/") + ".tmp")
        hint = "the stage that makes it has not finished" if unfinished else "check the path"
        raise UserError(f"{url}: no {MANIFEST} there, so no finished artifact; {hint}") from None
    except OSError as e:
        raise UserError(f"{manifest_url}: cannot be read ({e.strerror}); check the path") from None
    except (ValueError, RecursionError):
        raise UserError(f"{manifest_url}: not valid JSON, the manifest is damaged; {_AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        hint = "use the MicroLM that wrote it, or remove the folder"
        raise UserError(f"{manifest_url}: manifest format {found!r}, this version reads {FORMAT}; {hint}")
    if not _well_formed(manifest):
        raise UserError(f"{manifest_url}: a field is missing or of the wrong type; {_AGAIN}")
    return Artifact(url, storage.fetch(url), manifest)


def _checkpoint(url: str) -> Artifact | None:
    """The part of a model or adapter that is a whole model itself: its files, digest, and lineage."""
    place = url if storage.is_remote(url) else str(storage.local_path(url).absolute())
    parent, _, name = place.rstrip("/").rpartition("/")
    if not parent or not name.strip(".") or not storage.exists(storage.join(parent, MANIFEST)):
        return None
    owner = open_artifact(parent)
    files = [
        {**f, "path": f["path"].removeprefix(f"{name}/")}
        for f in owner.manifest["files"]
        if f["path"].startswith(f"{name}/")
    ]
    if owner.kind not in ("model", "adapter") or not any(f["path"] == CHECKPOINT for f in files):
        return None
    head = _head(owner.path / name / CHECKPOINT)
    told = {"name": name, "of": owner.digest} | {k: head.get(k) for k in ("step", "validation_loss")}
    changed: dict[str, Any] = {
        "key": sha256(f"{owner.key} {name}".encode()),
        "digest": payload_digest(files),
        "files": files,
        "inputs": {k: {**i, "path": _below(i["path"])} for k, i in owner.manifest["inputs"].items()},
        "checkpoint": told,
    }
    manifest = {k: v for k, v in {**owner.manifest, **changed}.items() if k != "seal"}
    if owner.manifest.get("seal") == seal(owner.manifest):  # else its own is missing, and so it is damaged
        manifest["seal"] = seal(manifest)
    return Artifact(url, owner.path / name, manifest)


def _head(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    try:
        head = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        head = None
    if not isinstance(head, dict):
        raise UserError(f"{path}: is missing or damaged; {_AGAIN}")
    return head


def _below(path: str) -> str:
    """An input's place as a folder one deeper names it."""
    fixed = storage.is_remote(path) or path.startswith(storage.BUILTIN) or Path(path).is_absolute()
    return path if fixed else f"../{path}"


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    texts = all(isinstance(manifest.get(k), str) for k in ("kind", "key", "digest"))
    files, inputs = manifest.get("files"), manifest.get("inputs")
    if not texts or not isinstance(files, list) or not isinstance(inputs, dict):
        return False
    shapes = {"path": str, "bytes": int, "sha256": str, "payload": bool}
    rows = [*files, *inputs.values()]
    if not all(isinstance(row, dict) and isinstance(row.get("path"), str) for row in rows):
        return False
    if any(Path(f["path"]).is_absolute() or ".." in Path(f["path"]).parts for f in files):
        return False
    linked = all(isinstance(i.get(k), str) for i in inputs.values() for k in ("key", "digest"))
    return linked and all(isinstance(f.get(k), t) for f in files for k, t in shapes.items())


def damages(artifact: Artifact) -> dict[str, str]:
    """File name → missing, changed or extra, for every file whose bytes differ from the manifest."""
    found: dict[str, str] = {}
    for entry in artifact.manifest["files"]:
        path = artifact.path / entry["path"]
        if not path.is_file():
            found[entry["path"]] = "missing"
        elif path.stat().st_size != entry["bytes"] or hash_file(path) != entry["sha256"]:
            found[entry["path"]] = "changed"
    listed = {f["path"] for f in artifact.manifest["files"]}
    present = {p.relative_to(artifact.path).as_posix() for p in artifact.path.rglob("*") if p.is_file()}
    found |= dict.fromkeys(present - listed - {MANIFEST}, "extra")
    broken_seal = artifact.manifest.get("seal") != seal(artifact.manifest)
    if broken_seal or payload_digest(artifact.manifest["files"]) != artifact.digest:
        found[MANIFEST] = "changed"
    return dict(sorted(found.items()))


def require_intact(artifact: Artifact) -> Artifact:
    """Refuse an artifact with a changed byte, by the file's name."""
    for name, what in damages(artifact).items():
        raise UserError(f"{artifact.url}/{name}: {what} since the manifest was written; {_AGAIN}")
    return artifact


def folder_digest(folder: Path, files: Iterable[Path]) -> str:
    """The payload digest of files that are not signed yet."""
    rows = [(f.relative_to(folder).as_posix(), hash_file(f)) for f in sorted(files)]
    return payload_digest([{"path": name, "sha256": found, "payload": True} for name, found in rows])


def payload_digest(files: list[dict[str, Any]]) -> str:
    """The digest of a manifest's file list: names and hashes of the payload files, in order."""
    return sha256(json.dumps([[f["path"], f["sha256"]] for f in files if f["payload"]]).encode())


def seal(manifest: Mapping[str, Any]) -> str:
    """The hash of everything else in a manifest, so that a changed byte of its own is found too."""
    plain = json.loads(json.dumps({k: v for k, v in manifest.items() if k != "seal"}))
    return sha256(json.dumps(plain, sort_keys=True).encode())


def hash_file(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
