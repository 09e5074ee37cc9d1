"""The runs on this disk: list them, remove one that nothing depends on, sweep up what crashes left.

Enters: a root directory. Leaves: rows, or fewer directories. Only local places.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from microlm.core import artifact, lineage, manifest, storage
from microlm.core.errors import UserError

REPORT = "report.html"


@dataclass(frozen=True)
class Run:
    """One artifact under the root. `state` is finished, unfinished, running or damaged."""

    name: str
    kind: str
    state: str
    digest: str
    bytes: int
    finished: float | None
    seconds: float | None  # None too where an earlier attempt was cut off: nobody counted its time


@dataclass(frozen=True)
class Leftover:
    """A folder or lock file that an interrupted stage left."""

    path: Path
    bytes: int


def list_runs(root: Path) -> list[Run]:
    """Every artifact under `root`, and every stage that has begun and not finished, by name."""
    _require_folder(root)
    finished = [_finished(root, Path(url)) for url in lineage.find_artifacts(str(root))]
    begun = [_unfinished(root, path) for path in _temporaries(root)]
    return sorted(finished + begun, key=lambda r: (r.name, r.state))


def remove(name: str, root: Path, *, force: bool = False) -> list[Path]:
    """Delete RUN/STAGE (or every stage of RUN) and return the paths; refuse what another was made from."""
    target = _target(name, root)
    doomed = [Path(url).resolve() for url in lineage.find_artifacts(str(target))]
    if not doomed:
        raise UserError(f"{target}: no finished artifact there; see 'microlm runs list {root}'")
    for path in doomed:
        if storage.is_locked(artifact.lock_path(str(path))):
            raise UserError(f"{path}: a stage is being made there; stop it first")
    if not force and (needed := _dependent(doomed, root if root.is_dir() else target.parent)):
        child, parent = needed
        raise UserError(f"{parent}: '{child}' was made from it; remove that first, or use --force")
    for path in doomed:
        with storage.explain_write(path):
            _remove_copy(path)
            shutil.rmtree(path)
    for folder in (target, target.parent):
        if folder.is_dir() and folder.resolve() != root.resolve() and not any(folder.iterdir()):
            folder.rmdir()
    return doomed


def _remove_copy(path: Path) -> None:
    """Delete the report.html that the report stage put beside its artifact, unless it is another one."""
    own, beside = path / artifact.LOGS / REPORT, path.parent / REPORT
    if own.is_file() and beside.is_file() and own.read_bytes() == beside.read_bytes():
        beside.unlink()


def leftovers(root: Path) -> list[Leftover]:
    """Temporary and replaced folders and locks under `root` that no living process holds."""
    _require_folder(root)
    found = [p for p in _walk(root) if _is_leftover(p) and not storage.is_locked(_lock_of(p))]
    return [Leftover(p, size(p)) for p in found]


def collect(root: Path) -> list[Leftover]:
    """Delete the leftovers under `root` and return them."""
    gone = leftovers(root)
    for item in gone:
        with storage.explain_write(item.path):
            shutil.rmtree(item.path) if item.path.is_dir() else item.path.unlink(missing_ok=True)
    return gone


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; give the folder that holds your runs")


def _target(name: str, root: Path) -> Path:
    for path in (root / name, Path(name)):
        if path.exists():
            if root.resolve().is_relative_to(path.resolve()):
                raise UserError(f"{name}: that is all of {root}; name one run in it")
            return path
    raise UserError(f"{name}: no such run in {root}; see 'microlm runs list {root}'")


def _finished(root: Path, path: Path) -> Run:
    name = os.path.relpath(path, root)
    try:
        done = manifest.open_artifact(str(path))
    except UserError:
        return Run(name, "?", "damaged", "", size(path), None, None)
    finished = done.manifest.get("times", {}).get("finished")
    total = sum(f["bytes"] for f in done.manifest["files"])
    return Run(name, done.kind, "finished", done.digest, total, finished, seconds_of(done))


def seconds_of(done: manifest.Artifact) -> float | None:
    """What a stage took; None where it was resumed, as a manifest knows the last attempt only."""
    times = done.manifest.get("times", {})
    return None if times.get("resumed") else times.get("seconds")


def _unfinished(root: Path, path: Path) -> Run:
    name = os.path.relpath(path, root).removesuffix(".tmp")
    state = "running" if storage.is_locked(_lock_of(path)) else "unfinished"
    return Run(name, "?", state, "", size(path), None, None)


def _dependent(doomed: list[Path], root: Path) -> tuple[str, Path] | None:
    """An artifact under `root` outside the doomed that has a doomed one as input."""
    for url in lineage.find_artifacts(str(root)):
        if Path(url).resolve() in doomed:
            continue
        try:
            inputs = manifest.open_artifact(url).manifest["inputs"]
        except UserError:
            continue
        for reference in inputs.values():
            place = Path(lineage.input_url(url, reference["path"]))
            for parent in (place, place.parent):  # a checkpoint lies in its model's folder
                if parent in doomed:
                    return url, parent
    return None


def _walk(root: Path, depth: int = lineage.MAX_DEPTH) -> Iterator[Path]:
    """Everything under `root`, not looking into artifacts or temporary folders."""
    for path in sorted(root.iterdir()):
        yield path
        inner = path.is_dir() and not path.is_symlink() and not _is_leftover(path)
        if inner and depth and not (path / manifest.MANIFEST).exists():
            yield from _walk(path, depth - 1)


def _temporaries(root: Path) -> list[Path]:
    return [p for p in _walk(root) if _is_leftover(p) and p.name.endswith(".tmp")]


def _is_leftover(path: Path) -> bool:
    """Whether a stage of ours left it: names alone could be anybody's, so its content must say so too."""
    name = path.name
    signed = (path / manifest.MANIFEST).is_file()
    if path.is_dir() and name.endswith(".tmp") and name != ".tmp":
        return signed or (path / "resume" / "key").is_file() or not any(path.iterdir())
    if path.is_dir():
        return signed and name.startswith(".") and name.endswith(".old")
    return name.startswith(".") and name.endswith(".lock") and path.stat().st_size == 0


def _lock_of(path: Path) -> Path:
    stem = path.name
    for suffix in (".tmp", ".old", ".lock"):
        stem = stem.removesuffix(suffix)
    return path.with_name(f".{stem.removeprefix('.')}.lock")
