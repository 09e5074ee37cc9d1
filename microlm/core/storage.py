"""Files behind fsspec: plain paths stay plain, `s3://…` and other URLs go through the same five functions.

A stage always writes to a local folder; `publish` makes it visible at its place, `fetch` brings one back.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from microlm.core import runtime
from microlm.core.errors import UserError

MANIFEST = "manifest.json"


def is_remote(url: str) -> bool:
    """Whether `url` names something else than a path on this machine."""
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
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
    fs, path = fsspec.core.url_to_fs(url)
    return bool(fs.exists(path))


def read_bytes(url: str) -> bytes:
    """A whole file."""
    if not is_remote(url):
        return local_path(url).read_bytes()
    with fsspec.open(url, "rb") as f:
        return bytes(f.read())


def list_names(url: str) -> list[str]:
    """The names directly under a directory, sorted; empty when it is not there."""
    if not is_remote(url):
        path = local_path(url)
        return sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    fs, path = fsspec.core.url_to_fs(url)
    if not fs.exists(path):
        return []
    return sorted(str(p).rstrip("/").rpartition("/")[2] for p in fs.ls(path, detail=False))


def remove(url: str) -> None:
    """Delete a file or a directory with all that is in it."""
    if is_remote(url):
        fs, path = fsspec.core.url_to_fs(url)
        fs.rm(path, recursive=True)
    elif local_path(url).is_dir():
        shutil.rmtree(local_path(url))
    else:
        local_path(url).unlink()


def publish(folder: Path, url: str) -> None:
    """Copy a finished local folder to a remote place, the manifest last: without it nothing exists."""
    fs, root = fsspec.core.url_to_fs(url)
    if fs.exists(root):
        fs.rm(root, recursive=True)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    for name in [n for n in names if n != MANIFEST] + [MANIFEST]:
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.put_file(str(folder / name), f"{root}/{name}")


def fetch(url: str) -> Path:
    """A local folder with the content of `url`: the folder itself, or a cached copy keyed by its manifest."""
    if not is_remote(url):
        return local_path(url)
    fs, root = fsspec.core.url_to_fs(url)
    try:
        manifest = read_bytes(join(url, MANIFEST))
    except FileNotFoundError:
        raise UserError(f"{url}: no {MANIFEST} there, so no finished artifact; check the address") from None
    folder = runtime.cache_dir() / "fetched" / hashlib.sha256(url.encode() + manifest).hexdigest()[:24]
    if not (folder / MANIFEST).exists():
        for path in fs.find(root):
            name = str(path)[len(root) :].lstrip("/")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name != MANIFEST:
                fs.get_file(path, str(folder / name))
        write_atomic(folder / MANIFEST, manifest)
    return folder


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".part")
    with explain_write(path):
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, finished stages are kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose another place with out=DIR",
    errno.EACCES: "permission denied; choose a writable place with out=DIR",
    errno.EPERM: "not permitted; choose a writable place with out=DIR",
    errno.EIO: "the disk reported an input/output error; check the disk, then run the same command again",
    errno.ENOTDIR: "a file stands where a folder is needed; move it away or choose another place with out=DIR",
    errno.EEXIST: "a file stands where a folder is needed; move it away or choose another place with out=DIR",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter place with out=DIR",
}


@contextmanager
def explain_write(path: str | Path) -> Iterator[None]:
    """Turn an operating-system refusal to write into a sentence with a next step."""
    try:
        yield
    except OSError as e:
        if e.errno not in _REASONS:
            raise
        raise UserError(f"{e.filename or path}: {_REASONS[e.errno]}") from e
