"""A command, watched from outside (Linux). Leaves: time, CPU time and memory of the whole process tree."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from quickstart import descendants

POLL_S = 0.1
PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


class Watched(NamedTuple):
    """What a command cost; memory is summed over processes, shared pages counted in each."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    output: str


def watch(command: list[str], cwd: Path, env: dict[str, str], log: Path) -> Watched:
    """Run a command to its end; its standard error goes to `log`, shown if it fails."""
    started = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=errors)
        sampler = _Sampler(process)
        sampler.start()
        output = process.communicate()[0].decode("utf-8")
    wall_s = time.monotonic() - started
    sampler.join()
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        sys.exit(f"{sys.argv[0]}: {' '.join(command[:4])} … failed:\n{tail}")
    return Watched(wall_s, sum(sampler.cpu_s.values()), sampler.peak_rss_bytes, output)


class _Sampler(threading.Thread):
    """Looks at the tree every 0.1 s: what a process used after its last look is not seen."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._process = process
        self.cpu_s: dict[int, float] = {}
        self.peak_rss_bytes = 0

    def run(self) -> None:
        while self._process.poll() is None:
            resident = 0
            for pid in descendants(self._process.pid):
                try:
                    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
                except OSError:  # it has ended
                    continue
                fields = stat.rpartition(")")[2].split()
                self.cpu_s[pid] = (int(fields[11]) + int(fields[12])) / TICKS
                resident += int(fields[21]) * PAGE
            self.peak_rss_bytes = max(self.peak_rss_bytes, resident)
            time.sleep(POLL_S)
