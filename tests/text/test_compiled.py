"""Compiled loops: what is kept on disk follows the files that it was made of."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
INNER = "from microlm.text.compiled import njit\n\n@njit\ndef inner(x):\n    return x + {}\n"
OUTER = "from inner import inner, njit\n\n@njit\ndef outer(x):\n    return inner(x)\n"


def run(folder: Path) -> tuple[int, int]:
    """What `outer(1)` gives in a fresh process, and how often it was taken from the disk."""
    code = "from outer import outer; print(outer(1), sum(outer.stats.cache_hits.values()))"
    paths = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(folder)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    value, hits = done.stdout.split()
    return int(value), int(hits)


def test_a_change_in_a_called_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "inner.py").write_text(INNER.format(1))
    (tmp_path / "outer.py").write_text(OUTER)
    assert run(tmp_path) == (2, 0)
    assert run(tmp_path) == (2, 1)
    (tmp_path / "inner.py").write_text(INNER.format(10))
    assert run(tmp_path) == (11, 0)
