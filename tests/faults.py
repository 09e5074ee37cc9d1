"""A disk that refuses, tears or loses.

Every opening, write, sync, rename and deletion under a folder is counted; at the n-th it does as it is told.
After a crash nothing works any more, clean-up neither.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from safetensors import SafetensorError

Fault = Literal["crash", "torn", "power cut", "full", "broken"]
"""The process ends before the operation, or half-way through it; or that and what was not synced is lost; or
the disk has no room from then on; or one operation meets an input/output error."""
ERRORS = {"full": (28, "No space left on device"), "broken": (5, "Input/output error")}


class Crash(BaseException):
    """The process is dead; no `except Exception` sees it."""


class Disk:
    """`Disk(folder).install(monkeypatch, modules)`; `modules` hold a `save_file` of safetensors."""

    def __init__(self, folder: Path, at: int = 0, fault: Fault = "crash") -> None:
        self.folder, self.at, self.fault = folder, at, fault
        self.done: list[str] = []
        self.dead = False
        self._unsynced: set[Path] = set()
        self._renames: list[tuple[Path, Path]] = []

    def install(self, patch: pytest.MonkeyPatch, modules: tuple[ModuleType, ...]) -> None:
        patch.setattr(os, "fsync", self._sync(os.fsync))
        patch.setattr(Path, "open", self._open(Path.open))
        for name in ("rename", "replace"):
            patch.setattr(Path, name, self._rename(name, getattr(Path, name)))
        for name in ("unlink", "mkdir"):
            patch.setattr(Path, name, self._plain(name, getattr(Path, name)))
        patch.setattr(shutil, "rmtree", self._remove(shutil.rmtree))
        for module in modules:
            patch.setattr(module, "save_file", self._save(module.save_file))

    def _count(self, what: str, path: Path, half: Callable[[], object] = lambda: None) -> None:
        """One operation; `half` does it half, for the fault that tears."""
        if self.dead:
            raise Crash
        self.done.append(f"{what} {path.name}")
        here = len(self.done)
        if self.fault in ERRORS and (here == self.at or (self.fault == "full" and 0 < self.at < here)):
            if self.fault == "broken" or what in ("open", "write", "sync", "mkdir", "save"):
                code, told = ERRORS[self.fault]
                if what == "save":
                    raise SafetensorError(f"Error while serializing: I/O error: {told} (os error {code})")
                raise OSError(code, told, str(path))
        elif self.fault not in ERRORS and here == self.at:
            if self.fault != "crash":
                half()
            if self.fault == "power cut":
                self._lose()
            self.dead = True
            raise Crash

    def _lose(self) -> None:
        """Files whose last bytes were not synced are empty, renames in an unsynced folder never happened."""
        for old, new in reversed(self._renames):
            if new.exists() and not old.exists():
                shutil.move(new, old)
        for path in self._unsynced:
            if path.is_file():
                os.truncate(path, 0)

    def _ours(self, path: Any) -> bool:
        return Path(path).is_relative_to(self.folder)

    def _sync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(handle: int) -> None:
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if self._ours(path):
                self._count("sync", path)
                self._unsynced.discard(path)
                self._renames = [(a, b) for a, b in self._renames if b.parent != path]
            else:
                real(handle)

        return sync

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if "r" in mode or not self._ours(path):
                return real(path, mode, *rest, **named)
            self._count("open", path)
            self._unsynced.add(path)
            return _File(self, path, real(path, mode, *rest, **named))

        return opened

    def _rename(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def rename(path: Path, target: Path) -> Any:
            if self._ours(path):
                self._count(name, path)
                self._renames.append((path, Path(target)))
                self._unsynced = {
                    Path(target) / p.relative_to(path) if p.is_relative_to(path) and p != path else
                    (Path(target) if p == path else p)
                    for p in self._unsynced
                }  # fmt: skip
            return real(path, target)

        return rename

    def _plain(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *rest: Any, **named: Any) -> Any:
            if self._ours(path):
                self._count(name, path)
            return real(path, *rest, **named)

        return call

    def _remove(self, real: Callable[..., None]) -> Callable[..., None]:
        def remove(path: Path, ignore_errors: bool = False) -> None:
            def half() -> None:
                for entry in sorted(path.iterdir())[::2]:
                    os.truncate(entry, 0)

            if self._ours(path):
                self._count("rmtree", Path(path), half)
            real(path, ignore_errors)

        return remove

    def _save(self, real: Callable[..., None]) -> Callable[..., None]:
        def save(tensors: Any, path: Path, metadata: Any = None) -> None:
            def half() -> None:
                real(tensors, path, metadata=metadata)
                os.truncate(path, path.stat().st_size // 2)

            self._count("save", Path(path), half)
            self._unsynced.add(Path(path))
            real(tensors, path, metadata=metadata)

        return save


class _File:
    """A file open for writing on such a disk."""

    def __init__(self, disk: Disk, path: Path, real: Any) -> None:
        self._disk, self._path, self._real = disk, path, real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._real.close()

    def write(self, data: Any) -> int:
        def half() -> None:
            self._real.write(data[: len(data) // 2])
            self._real.flush()

        self._disk._count("write", self._path, half)
        self._disk._unsynced.add(self._path)
        return int(self._real.write(data))
