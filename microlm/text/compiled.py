"""Loops compiled with numba; without it the same functions run as plain Python: slower, equal results.

The only place that imports numba. `cgutils`, `intrinsic`, `ir`, `overload` and `types` are for code that has
no plain form (engine/native); they are None where numba is not there.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

_njit: Any = None
cgutils: Any = None
intrinsic: Any = None
ir: Any = None
overload: Any = None
types: Any = None
with contextlib.suppress(ImportError):
    import llvmlite.ir
    import numba
    import numba.core.cgutils
    import numba.extending

    _njit, types, ir, cgutils = numba.njit, numba.types, llvmlite.ir, numba.core.cgutils
    intrinsic, overload = numba.extending.intrinsic, numba.extending.overload

IS_COMPILED = _njit is not None
"""Whether numba is there."""


def njit(function: F) -> F:
    """Compile a function at its first call, once for each machine; it works without the GIL."""
    if _njit is None:
        return np.errstate(over="ignore")(function)  # hashes wrap around, as they do when compiled
    return _cached(_njit(cache=True, nogil=True)(function))


def njit_float(function: F) -> F:
    """As `njit`, for loops over floats: sums may be taken in lanes, a division by zero gives inf or nan."""
    if _njit is None:
        return function
    flags = {"reassoc", "nsz", "contract"}
    return _cached(_njit(cache=True, nogil=True, error_model="numpy", fastmath=flags)(function))


def _cached(compiled: Any) -> Any:
    """What is kept on disk counts while no file beside the function's changes: numba sees its own only."""
    file: Any = getattr(compiled._cache, "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = _stamp(Path(compiled.py_func.__code__.co_filename).parent)
    return compiled


@functools.cache
def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of a folder's modules."""
    files = sorted(folder.glob("*.py"))
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@functools.cache
def tell_slow(job: str, way: str = "as plain Python") -> None:
    """Without numba: one line on stderr, once for each job."""
    if not IS_COMPILED:
        sys.stderr.write(f"{job}: numba is not installed, so this runs {way}, far slower\n")
