"""A stage's directory: written as `<out>.tmp`, signed with a manifest, renamed. No manifest, no artifact.

Enters: a recipe and the stage's body. Leaves: an `Artifact` with its key (what was asked) and its digest
(what came out).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, TypeVar

from microlm import __version__
from microlm.core import runtime, storage
from microlm.core.errors import UserError
from microlm.core.manifest import (
    FORMAT,
    MANIFEST,
    Artifact,
    Kind,
    damages,
    find,
    hash_file,
    open_artifact,
    payload_digest,
    require_intact,
    seal,
    sha256,
)
from microlm.core.recipe import StageRecipe

__all__ = [
    "FORMAT", "JUDGED", "LOGS", "MANIFEST", "RESUME", "Artifact", "Kind", "Workspace", "compute_key",
    "damages", "find", "hash_file", "lock_path", "open_artifact", "payload_digest", "replaced",
    "require_intact", "sha256", "stage", "temporary",
]  # fmt: skip
LOGS = "logs"  # metrics, reports, times: hashed, but not part of the digest
RESUME = "resume"  # private state of an unfinished stage, deleted at the end
JUDGED = "judged"  # a file in it: the body itself decides whether that state fits another key
R = TypeVar("R", bound=StageRecipe)


@dataclass
class Workspace:
    """What a stage's body writes into. `metrics`, `licences` and `processes` end in the manifest."""

    path: Path
    out: str
    inputs: dict[str, Artifact]
    metrics: dict[str, Any] = field(default_factory=dict)
    licences: set[str] = field(default_factory=set)
    processes: int = 1
    resumed: bool = False  # an earlier attempt was cut off; `seconds` in the manifest are the last one's

    @property
    def logs(self) -> Path:
        """The folder for what is not payload; it too survives a crash of this stage."""
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


Body = Callable[Concatenate[R, Workspace, ...], None]
Fingerprint = Callable[[R], Mapping[str, Any]]


def stage(
    name: str, kind: Kind | Callable[[Any], Kind], version: int, fingerprint: Fingerprint[Any] | None = None
) -> Callable[[Body[R]], Callable[Concatenate[R, ...], Artifact]]:
    """Make a body `(recipe, workspace, **tools) → None` into `run(recipe, **tools) → Artifact`.

    `run` returns the finished artifact of the same key if it is there, resumes `<out>.tmp` otherwise, and
    finishes atomically. `fingerprint` adds what else changes the result (the digest of a user's file, say);
    `tools`, passed in by the cli from other rooms, change none.
    """

    def wrap(body: Body[R]) -> Callable[Concatenate[R, ...], Artifact]:
        def make(recipe: R, bound: Body[R]) -> Artifact:
            inputs = _open_inputs(recipe)
            extra = dict(fingerprint(recipe)) if fingerprint else {}
            key = compute_key(name, version, recipe, inputs, extra)
            if done := _finished(recipe.out, key, inputs):
                return done
            if not storage.is_free(recipe.out):
                raise UserError(
                    f"{recipe.out}: is in the way and is no artifact; move it away or choose another place"
                )
            actual: Kind = kind(recipe) if callable(kind) else kind
            head = {"format": FORMAT, "kind": actual, "stage": name, "stage_version": version, "key": key}
            busy = f"{recipe.out}: another process is making this artifact; wait for it, or stop it"
            with storage.locked(lock_path(recipe.out), busy):
                return _finished(recipe.out, key, inputs) or _make(bound, recipe, inputs, head)

        @functools.wraps(body)
        def run(recipe: R, **tools: Any) -> Artifact:
            group, bound = runtime.torchrun(), functools.partial(body, **tools)
            if group is None:
                return make(recipe, bound)
            return _follow(group, bound, recipe) if group.rank else _lead(group, lambda: make(recipe, bound))

        run.stage_kind = kind  # type: ignore[attr-defined]
        return run

    return wrap


def _open_inputs(recipe: StageRecipe) -> dict[str, Artifact]:
    """The input artifacts by field; one of a kind that its field does not take is refused."""
    found = {name: open_artifact(place) for name, place in recipe.inputs().items()}
    for name, artifact in found.items():
        kinds = recipe.input_kinds(name)
        if kinds and artifact.kind not in kinds:
            wanted = " or ".join(kinds)
            raise UserError(
                f"{artifact.url}: is of kind {artifact.kind}, but '{name}' takes {wanted}; give another one"
            )
    return found


def _lead(group: runtime.Torchrun, make: Callable[[], Artifact]) -> Artifact:
    """Rank 0 under torchrun: make the artifact, then let the others go on."""
    made = make()
    group.say("done")
    group.stage += 1
    return made


def _follow(group: runtime.Torchrun, body: Body[R], recipe: R) -> Artifact:
    """The other ranks: help where rank 0 calls for it (see `train.ranks`), and write nothing of their own."""
    if group.hear("launch", "done") == "launch":
        inputs = {k: open_artifact(v) for k, v in recipe.inputs().items()}
        body(recipe, Workspace(temporary(recipe.out), recipe.out, inputs))
        group.hear("done")
    group.stage += 1
    return open_artifact(recipe.out)


def _make(body: Body[R], recipe: R, inputs: dict[str, Artifact], head: dict[str, Any]) -> Artifact:
    """Run the body in `<out>.tmp`, sign, rename; the caller holds the lock."""
    folder = _folder(temporary(recipe.out))
    if recovered := _recover(recipe.out, folder, head["key"], inputs):
        return recovered
    for artifact in inputs.values():
        require_intact(artifact)
    workspace = _open_workspace(folder, recipe.out, head["key"], inputs)
    started = time.time()
    with storage.explain_write(folder):
        body(recipe, workspace)
        _sign(head, recipe, workspace, started)
    return _finish(recipe.out, folder)


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
    return sha256(json.dumps(asked, ensure_ascii=False, sort_keys=True).encode())


def _folder(path: Path) -> Path:
    with storage.explain_write(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def temporary(out: str) -> Path:
    """The local folder in which the artifact for `out` is made."""
    if storage.is_remote(out):
        return runtime.cache_dir() / "work" / (sha256(out.encode())[:24] + ".tmp")
    path = storage.local_path(out).absolute()
    if not path.name:
        raise UserError(f"{out}: cannot be an artifact's place; name a folder inside it")
    return path.with_name(path.name + ".tmp")


def lock_path(out: str) -> Path:
    """The lock of the process that makes the artifact for `out`: beside the folder, which is renamed."""
    folder = temporary(out)
    return folder.with_name(f".{folder.name.removesuffix('.tmp')}.lock")


def replaced(target: Path) -> Path:
    """Where an artifact lies while a new one takes its place (after a crash `runs gc` deletes it)."""
    return target.with_name(f".{target.name}.old")


def _digests(inputs: Mapping[str, Artifact]) -> dict[str, str]:
    return {name: artifact.digest for name, artifact in sorted(inputs.items())}


def _was_made_for(manifest: Mapping[str, Any], key: str, inputs: Mapping[str, Artifact]) -> bool:
    """Whether a manifest answers this key from these very inputs: an input may be remade with other bytes."""
    made_from = {name: i["digest"] for name, i in sorted(manifest.get("inputs", {}).items())}
    return manifest.get("key") == key and made_from == _digests(inputs)


def _finished(out: str, key: str, inputs: Mapping[str, Artifact]) -> Artifact | None:
    """The artifact at `out` if it was made for this key and no file of it is missing or cut off."""
    done = find(out)
    if done is None or not _was_made_for(done.manifest, key, inputs):
        return None
    sizes = ((done.path / f["path"], f["bytes"]) for f in done.manifest["files"])
    return done if all(p.is_file() and p.stat().st_size == size for p, size in sizes) else None


def _recover(out: str, folder: Path, key: str, inputs: Mapping[str, Artifact]) -> Artifact | None:
    """A run that died between signing and renaming only needs the rename."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    try:
        if _was_made_for(json.loads(manifest.read_bytes()), key, inputs):
            return _finish(out, folder)
    except (ValueError, KeyError, AttributeError):
        pass
    manifest.unlink()
    return None


def _open_workspace(folder: Path, out: str, key: str, inputs: dict[str, Artifact]) -> Workspace:
    """Keep `resume/` and `logs/` of the same key, or that the body judges; everything else is made anew."""
    mark, asked = folder / RESUME / "key", "\n".join([key, *_digests(inputs).values()])
    judged = (folder / RESUME / JUDGED).exists()
    same = mark.exists() and (judged or mark.read_text(encoding="utf-8") == asked)
    for entry in folder.iterdir():
        if same and entry.name in (RESUME, LOGS):
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    workspace = Workspace(folder, out, inputs, resumed=same)
    if not same:
        storage.write_atomic(workspace.resume / "key", asked.encode())
    for artifact in inputs.values():
        workspace.licences.update(artifact.manifest.get("licences", []))
    return workspace


def _sign(head: dict[str, Any], recipe: StageRecipe, work: Workspace, started: float) -> None:
    """Hash every file, write the manifest last, sync all; `resume/` stays until then."""
    assert not (work.path / MANIFEST).exists(), "a stage's body does not write the manifest"
    files = []
    for path in sorted(work.path.rglob("*")):
        name = path.relative_to(work.path).as_posix()
        if name.split("/")[0] == RESUME:
            continue
        if path.is_dir():
            storage.sync_folder(path)
            continue
        with path.open("rb") as f:
            os.fsync(f.fileno())
        payload = not name.startswith(LOGS + "/")
        size = path.stat().st_size
        files.append({"path": name, "bytes": size, "sha256": hash_file(path), "payload": payload})
    now = time.time()
    times = {"started": started, "finished": now, "seconds": now - started, "resumed": work.resumed}
    manifest = head | {
        "digest": payload_digest(files),
        "recipe": recipe.model_dump(mode="json"),
        "inputs": {k: _reference(work.out, a) for k, a in work.inputs.items()},
        "files": files,
        "seed": recipe.seed,
        "metrics": work.metrics,
        "licences": sorted(work.licences),
        "code": {"version": __version__, "commit": runtime.code_commit()},
        "environment": runtime.environment(work.processes),
        "times": times,
    }
    manifest["seal"] = seal(manifest)
    text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    storage.write_atomic(work.path / MANIFEST, text.encode())


def _reference(out: str, artifact: Artifact) -> dict[str, Any]:
    """An input as the manifest names it: relative to our parent folder when both are local.

    Of a checkpoint that a model keeps it is told which one it is.
    """
    place = artifact.url
    if not storage.is_remote(place) and not place.startswith(storage.BUILTIN):
        path = storage.local_path(place).resolve()
        here = storage.local_path(out).absolute().parent.resolve()
        place = str(path) if storage.is_remote(out) else os.path.relpath(path, here)
    found = {"path": place, "key": artifact.key, "digest": artifact.digest}
    kept = artifact.manifest.get("checkpoint")
    return found | {"checkpoint": kept} if kept else found


def _finish(out: str, folder: Path) -> Artifact:
    """Make the signed folder visible at its place, in one rename (or manifest-last upload)."""
    if (folder / RESUME).exists():
        shutil.rmtree(folder / RESUME)
    if storage.is_remote(out):
        storage.publish(folder, out)
        shutil.rmtree(folder)
        return open_artifact(out)
    target = storage.local_path(out).absolute()
    with storage.explain_write(target):
        if (target / MANIFEST).exists():
            _replace(target, folder)
        else:
            folder.rename(target)
        storage.sync_folder(target.parent)
    return open_artifact(out)


def _replace(target: Path, folder: Path) -> None:
    """Put `folder` where an older artifact stands; when the disk refuses, the older one stays."""
    old = replaced(target)
    if old.exists():
        shutil.rmtree(old)
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
