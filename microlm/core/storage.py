"""Files behind fsspec: plain paths stay plain, `s3://…` and other URLs go through the same five functions.

A stage always writes to a local folder; `publish` makes it visible at its place, `fetch` brings one back.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from microlm.core import runtime
from microlm.core.errors import UserError

MANIFEST = "manifest.json"
BUILTIN = "builtin:"
"""`builtin:NAME` is an artifact that comes with the package: a folder of `microlm/ready`."""
UPLOADING = ".uploading"  # lies in a remote place while `publish` works there


def is_remote(url: str) -> bool:
    """Whether `url` names something else than a path on this machine."""
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    if url.startswith(BUILTIN):
        return Path(__file__).parents[1] / "ready" / url.removeprefix(BUILTIN)
    return Path(url.removeprefix("file://")).expanduser()


def join(base: str, *parts: str) -> str:
    """`base/part/…` for paths and URLs alike."""
    return "/".join([base.rstrip("/"), *parts]) if is_remote(base) else str(local_path(base).joinpath(*parts))


def parent(url: str) -> str:
    """The place that holds `url`."""
    return url.rstrip("/").rpartition("/")[0] if is_remote(url) else str(local_path(url).parent)


def exists(url: str) -> bool:
    """Whether a file or directory is there."""
    if not is_remote(url):
        return local_path(url).exists()
    fs, path = _filesystem(url)
    return bool(fs.exists(path))


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it; a missing driver is named."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as e:
        extra = "; pip install 'microlm[s3]'" if url.startswith("s3://") else ""
        raise UserError(
            f"{url}: this kind of storage cannot be reached ({e}){extra or '; check the address'}"
        ) from None
    return fs, str(path)


def read_bytes(url: str) -> bytes:
    """A whole file."""
    if not is_remote(url):
        return local_path(url).read_bytes()
    fs, place = _filesystem(url)
    return bytes(fs.cat_file(place))


def list_names(url: str) -> list[str]:
    """The names directly under a directory, sorted; empty when it is not there."""
    if not is_remote(url):
        path = local_path(url)
        return sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    fs, place = _filesystem(url)
    if not fs.exists(place):
        return []
    return sorted(str(p).rstrip("/").rpartition("/")[2] for p in fs.ls(place, detail=False))


def remove(url: str) -> None:
    """Delete a file or a directory with all that is in it."""
    if is_remote(url):
        fs, path = _filesystem(url)
        fs.rm(path, recursive=True)
    elif local_path(url).is_dir():
        shutil.rmtree(local_path(url))
    else:
        local_path(url).unlink()


def is_free(url: str) -> bool:
    """Whether an artifact may be put at `url`: nothing, an empty folder, an artifact or half an upload."""
    if not exists(url):
        return True
    if not is_remote(url) and not local_path(url).is_dir():
        return False
    names = list_names(url)
    return not names or MANIFEST in names or UPLOADING in names


def publish(folder: Path, url: str) -> None:
    """Copy a finished local folder to a remote place, the manifest last: without it nothing exists."""
    fs, root = _filesystem(url.rstrip("/"))
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{UPLOADING}", b"")
    old = [p for p in map(str, fs.find(root)) if not p.endswith(f"/{UPLOADING}")]
    for path in sorted(old, key=lambda p: not p.endswith(f"/{MANIFEST}")):
        fs.rm_file(path)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for name in [n for n in names if n != MANIFEST] + [MANIFEST]:
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.put_file(str(folder / name), f"{root}/{name}")
    fs.rm_file(f"{root}/{UPLOADING}")


def fetch(url: str) -> Path:
    """A local folder with the content of `url`: the folder itself, or a cached copy keyed by its manifest."""
    if not is_remote(url):
        return local_path(url)
    fs, root = _filesystem(url.rstrip("/"))
    try:
        manifest = read_bytes(join(url, MANIFEST))
    except FileNotFoundError:
        raise UserError(f"{url}: no {MANIFEST} there, so no finished artifact; check the address") from None
    folder = runtime.cache_dir() / "fetched" / hashlib.sha256(url.encode() + manifest).hexdigest()[:24]
    if not (folder / MANIFEST).exists():
        for path in fs.find(root):
            name = str(path)[len(root) :].lstrip("/")
            if name not in (MANIFEST, UPLOADING):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(path, str(folder / name))
        write_atomic(folder / MANIFEST, manifest)
    return folder


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file so that a reader sees all of it or nothing: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".part")
    with explain_write(path):
        try:
            with temporary.open("wb") as f:
                f.writelines([data] if isinstance(data, bytes) else data)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def require_space(folder: Path, needed: int, what: str, hint: str) -> None:
    """Refuse to begin what the disk cannot hold: `needed` bytes beside what lies there already."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; {hint}"
        )


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut (where the file system lets a folder be synced)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` (deleted at the end); UserError(`busy`) when another process holds it."""
    with explain_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path)
    if handle is None:
        raise UserError(busy)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock file `path`."""
    try:
        with path.open("rb") as handle:
            return not _flock(handle)
    except OSError:
        return False


def _acquire(path: Path) -> IO[str] | None:
    while True:
        handle = path.open("a", encoding="utf-8")
        if not _flock(handle):
            handle.close()
            return None
        try:
            # The holder before us may just have deleted the file: ours is then a lock on nothing.
            if os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
                return handle
        except FileNotFoundError:
            pass
        handle.close()


def _flock(handle: IO[str] | IO[bytes]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a shared file system without locks
            raise
    return True


_IN_THE_WAY = "a file stands where a folder is needed; move it away or choose another place with output=DIR"
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose another place with output=DIR",
    errno.EACCES: "permission denied; change the permissions, or choose another place with output=DIR",
    errno.EPERM: "not permitted; choose another place with output=DIR",
    errno.EIO: "the disk reported an input/output error; check the disk, then run the same command again",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.ENAMETOOLONG: "the name is too long; choose a shorter place with output=DIR",
}


@contextmanager
def explain_write(path: str | Path) -> Iterator[None]:
    """Turn an operating-system refusal to write into a sentence with a next step."""
    try:
        yield
    except Exception as e:
        code = _error_number(e)
        if code not in _REASONS:
            raise
        raise UserError(f"{getattr(e, 'filename', None) or path}: {_REASONS[code]}") from e


def _error_number(error: Exception) -> int:
    """The errno of a refusal, also of one that a Rust library (safetensors, tokenizers) tells in words."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = None if isinstance(error, UserError) else re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else 0
