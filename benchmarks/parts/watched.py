"""A command, watched from outside (Linux). Leaves: time, CPU time and memory of the whole process tree."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from quickstart import descendants

POLL_S = 0.1
PAGE = os.sysconf("SC_PAGE_SIZE")


class Watched(NamedTuple):
    """What a command cost; memory is summed over processes, shared pages counted in each."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    output: str


def watch(command: list[str], cwd: Path, env: dict[str, str], log: Path) -> Watched:
    """Run a command to its end; its standard error goes to `log`, shown if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=errors)
        peak = [0]
        watcher = threading.Thread(target=_sample, args=(process, peak), daemon=True)
        watcher.start()
        output = process.communicate()[0].decode("utf-8")
    wall_s = time.monotonic() - started
    watcher.join()
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        sys.exit(f"benchmarks/data_prepare.py: {' '.join(command[:4])} … failed:\n{tail}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Watched(wall_s, cpu_s, peak[0], output)


def _sample(process: subprocess.Popen[bytes], peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(map(_resident, descendants(process.pid))))
        time.sleep(POLL_S)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE
    except (OSError, IndexError):  # it has ended
        return 0
