"""Loops compiled with numba; without it the same functions run as plain Python: slower, equal results."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

_njit: Any
try:
    from numba import njit as _njit
except ImportError:
    _njit = None

IS_COMPILED = _njit is not None
"""Whether numba is there."""


def njit(function: F) -> F:
    """Compile a function at its first call, once for each machine; it works without the GIL."""
    if _njit is None:
        return np.errstate(over="ignore")(function)  # hashes wrap around, as they do when compiled
    compiled: F = _njit(cache=True, nogil=True)(function)
    return compiled


@functools.cache
def tell_slow(job: str, way: str = "as plain Python") -> None:
    """Without numba: one line on stderr, once for each job."""
    if not IS_COMPILED:
        sys.stderr.write(f"{job}: numba is not installed, so this runs {way}, far slower\n")
