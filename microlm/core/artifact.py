"""A stage's directory: written as `<out>.tmp`, signed with a manifest, renamed. Without a manifest it does not exist.

Enters: a recipe and the stage's body. Leaves: an `Artifact` with its key (what was asked) and digest (what came out).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from microlm import __version__
from microlm.core import runtime, storage
from microlm.core.errors import UserError
from microlm.core.recipe import StageRecipe

FORMAT = 1
MANIFEST = storage.MANIFEST
LOGS = "logs"  # metrics, reports, times: hashed, but not part of the digest
RESUME = "resume"  # private state of an unfinished stage, deleted at the end
Kind = Literal["data", "tokenizer", "shards", "model", "adapter", "predictions", "scores", "verdict", "report"]
R = TypeVar("R", bound=StageRecipe)


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

    def file(self, name: str) -> Path:
        """The path of a file in it; a missing one is an error that names it."""
        path = self.path / name
        if not path.exists():
            raise UserError(f"{self.url}: holds no '{name}' (kind {self.kind}); is this the right artifact?")
        return path

    def json(self, name: str) -> Any:
        """A JSON file in it."""
        return json.loads(self.file(name).read_bytes())


@dataclass
class Workspace:
    """What a stage's body writes into. `metrics` and `licences` end in the manifest."""

    path: Path
    out: str
    inputs: dict[str, Artifact]
    metrics: dict[str, Any] = field(default_factory=dict)
    licences: set[str] = field(default_factory=set)

    @property
    def logs(self) -> Path:
        """The folder for what is not payload."""
        return _folder(self.path / LOGS)

    @property
    def resume(self) -> Path:
        """The folder whose content survives a crash of this stage, until it is finished."""
        return _folder(self.path / RESUME)

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file, stable byte for byte."""
        self.write_text(name, json.dumps(value, ensure_ascii=False, indent=1, sort_keys=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A UTF-8 text file."""
        path = self.path / name
        with storage.explain_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")

    def write_jsonl(self, name: str, rows: Iterator[Any] | list[Any]) -> int:
        """One JSON object a line; returns how many."""
        path = self.path / name
        count = 0
        with storage.explain_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="\n") as f:
                for row in rows:
                    f.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
                    count += 1
        return count


Body = Callable[[R, Workspace], None]
Fingerprint = Callable[[R], Mapping[str, Any]]


def stage(
    name: str, kind: Kind | Callable[[Any], Kind], version: int, fingerprint: Fingerprint[Any] | None = None
) -> Callable[[Body[R]], Callable[[R], Artifact]]:
    """Make a body `(recipe, workspace) → None` into `run(recipe) → Artifact`.

    `run` returns the finished artifact of the same key if it is there, resumes `<out>.tmp` otherwise, and finishes
    atomically. `fingerprint` adds what else changes the result (the digest of a user's file, say) to the key.
    """

    def wrap(body: Body[R]) -> Callable[[R], Artifact]:
        @functools.wraps(body)
        def run(recipe: R) -> Artifact:
            inputs = {k: open_artifact(v) for k, v in recipe.inputs().items()}
            extra = dict(fingerprint(recipe)) if fingerprint else {}
            key = compute_key(name, version, recipe, inputs, extra)
            actual: Kind = kind(recipe) if callable(kind) else kind
            done = find(recipe.out)
            if done and done.key == key:
                return done
            with _locked(recipe.out) as folder:
                if recovered := _recover(recipe.out, folder, key):
                    return recovered
                workspace = _open_workspace(folder, recipe.out, key, inputs)
                started = time.time()
                body(recipe, workspace)
                head = {"format": FORMAT, "kind": actual, "stage": name, "stage_version": version, "key": key}
                _sign(head, recipe, workspace, started)
                return _finish(recipe.out, folder)

        run.stage_kind = kind  # type: ignore[attr-defined]
        return run

    return wrap


def compute_key(
    name: str, version: int, recipe: StageRecipe, inputs: Mapping[str, Artifact], extra: Mapping[str, Any]
) -> str:
    """The hash of stage, version, the fields that change the result, and the inputs' keys."""
    asked = {
        "stage": name,
        "version": version,
        "recipe": recipe.keyed(),
        "inputs": {k: a.key for k, a in sorted(inputs.items())},
        "extra": dict(extra),
    }
    return _sha(json.dumps(asked, ensure_ascii=False, sort_keys=True).encode())


def find(url: str) -> Artifact | None:
    """The artifact at `url`, or None when there is no manifest."""
    if not storage.exists(storage.join(url, MANIFEST)):
        return None
    return open_artifact(url)


def open_artifact(url: str) -> Artifact:
    """The finished artifact at `url`; an error sentence when there is none or its format is unknown."""
    manifest_url = storage.join(url, MANIFEST)
    try:
        manifest = json.loads(storage.read_bytes(manifest_url))
    except (FileNotFoundError, NotADirectoryError):
        hint = "the stage that makes it has not finished" if storage.exists(url + ".tmp") else "check the path"
        raise UserError(f"{url}: no {MANIFEST} there, so no finished artifact; {hint}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{manifest_url}: not valid JSON, the manifest is damaged; make the artifact again") from None
    needed = ("kind", "key", "digest", "files", "inputs")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or any(k not in manifest for k in needed):
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{manifest_url}: manifest format {found!r}, this version reads {FORMAT}; use the MicroLM that wrote it")
    return Artifact(url, storage.fetch(url), manifest)


def damaged_file(artifact: Artifact) -> str | None:
    """The first file whose bytes differ from the manifest (missing, changed or extra), or None."""
    listed = {f["path"]: f for f in artifact.manifest["files"]}
    for name, entry in sorted(listed.items()):
        path = artifact.path / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or hash_file(path) != entry["sha256"]:
            return name
    present = {str(p.relative_to(artifact.path)) for p in artifact.path.rglob("*") if p.is_file()}
    unknown = sorted(present - set(listed) - {MANIFEST})
    return unknown[0] if unknown else None


def require_intact(artifact: Artifact) -> Artifact:
    """Refuse an artifact with a changed byte, by the file's name."""
    if name := damaged_file(artifact):
        raise UserError(f"{artifact.url}/{name}: differs from its manifest; the artifact is damaged, make it again")
    return artifact


def hash_file(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _folder(path: Path) -> Path:
    with storage.explain_write(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def _temporary(out: str) -> Path:
    if storage.is_remote(out):
        return runtime.cache_dir() / "work" / (_sha(out.encode())[:24] + ".tmp")
    path = storage.local_path(out)
    return path.with_name(path.name + ".tmp")


@contextmanager
def _locked(out: str) -> Iterator[Path]:
    """Own `<out>.tmp`: a second process that wants the same stage is told so."""
    folder = _folder(_temporary(out))
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is making this artifact; wait for it, or stop it") from None
        yield folder


def _recover(out: str, folder: Path, key: str) -> Artifact | None:
    """A run that died between signing and renaming only needs the rename."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    try:
        if json.loads(manifest.read_bytes()).get("key") == key:
            return _finish(out, folder)
    except ValueError:
        pass
    manifest.unlink()
    return None


def _open_workspace(folder: Path, out: str, key: str, inputs: dict[str, Artifact]) -> Workspace:
    """Keep `resume/` when it belongs to the same key; everything else is made anew."""
    mark = folder / RESUME / "key"
    same = mark.exists() and mark.read_text(encoding="utf-8") == key
    for entry in folder.iterdir():
        if entry.name == ".lock" or (same and entry.name == RESUME):
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    workspace = Workspace(folder, out, inputs)
    if not same:
        storage.write_atomic(workspace.resume / "key", key.encode())
    for artifact in inputs.values():
        workspace.licences.update(artifact.manifest.get("licences", []))
    return workspace


def _sign(head: dict[str, Any], recipe: StageRecipe, work: Workspace, started: float) -> None:
    """Hash every file, write the manifest last, fsync all."""
    if (work.path / RESUME).exists():
        shutil.rmtree(work.path / RESUME)
    files = []
    for path in sorted(p for p in work.path.rglob("*") if p.is_file() and p.name != ".lock"):
        name = path.relative_to(work.path).as_posix()
        with path.open("rb+") as f:
            os.fsync(f.fileno())
        payload = not name.startswith(LOGS + "/")
        files.append({"path": name, "bytes": path.stat().st_size, "sha256": hash_file(path), "payload": payload})
    digest = _sha(json.dumps([[f["path"], f["sha256"]] for f in files if f["payload"]]).encode())
    manifest = head | {
        "digest": digest,
        "recipe": recipe.model_dump(mode="json"),
        "inputs": {k: _reference(work.out, a) for k, a in work.inputs.items()},
        "files": files,
        "seed": recipe.seed,
        "metrics": work.metrics,
        "licences": sorted(work.licences),
        "code": {"version": __version__, "commit": runtime.code_commit()},
        "environment": runtime.environment(),
        "times": {"started": started, "finished": time.time(), "seconds": time.time() - started},
    }
    storage.write_atomic(work.path / MANIFEST, (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode())


def _reference(out: str, artifact: Artifact) -> dict[str, str]:
    """An input as the manifest names it: relative to our parent folder when both are local."""
    place = artifact.url
    if not storage.is_remote(out) and not storage.is_remote(artifact.url):
        place = os.path.relpath(storage.local_path(artifact.url).resolve(), storage.local_path(out).resolve().parent)
    return {"path": place, "key": artifact.key, "digest": artifact.digest}


def _finish(out: str, folder: Path) -> Artifact:
    """Make the signed folder visible at its place, in one rename (or manifest-last upload)."""
    (folder / ".lock").unlink(missing_ok=True)
    if storage.is_remote(out):
        storage.publish(folder, out)
        shutil.rmtree(folder)
        return open_artifact(out)
    target = storage.local_path(out)
    with storage.explain_write(target):
        if target.exists():
            if not (target / MANIFEST).exists():
                raise UserError(f"{target}: is in the way and is no artifact; move it away or choose another out=DIR")
            old = target.with_name(target.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
        storage.sync_folder(target.parent)
    return open_artifact(out)
