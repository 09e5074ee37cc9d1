"""A process that has torch loaded and forks a small training run for each line it reads: quick to kill often.

A line: {"folder", "dtype", "die_at", "kill_at_s"}: the run kills itself at that operation on files, or is
killed when it has used that much of the processor. The answer: how it ended (its exit code, or minus the
signal) and what it used.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from faults import Disk  # noqa: E402
from torch import Tensor  # noqa: E402
from training import make_job, tiny_decoder, tiny_loop  # noqa: E402

from microlm.model import directory  # noqa: E402
from microlm.model.transformer import Decoder  # noqa: E402
from microlm.train import objectives  # noqa: E402
from microlm.train.batches import Batch  # noqa: E402
from microlm.train.checkpoint import trained  # noqa: E402
from microlm.train.loop import train  # noqa: E402
from microlm.train.ranks import Ranks  # noqa: E402

STEPS = 12


class Killer(Disk):
    """A disk on which the process dies by SIGKILL at an operation; else it counts."""

    def _count(self, what: str, path: Path, half: Any = None) -> None:
        self.done.append(what)
        if len(self.done) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def noisy(hidden: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
    """The plain loss times numbers of every generator: a state that is not restored shows in the weights."""
    noise = random.random() + np.random.rand() + float(torch.rand(()))
    return objectives.next_token(hidden, decoder, batch) * (1 + 0.1 * noise)


def run(folder: Path, dtype: str) -> None:
    """Train, then save the weights."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    decoder = tiny_decoder()
    decoder.compute_dtype = getattr(torch, dtype)
    loop = tiny_loop(STEPS, dtype=dtype, checkpoint_steps=1, keep_best=True, validation_steps=3, log_steps=1)
    train(Ranks(0, 1), decoder, make_job(folder, loop, objective=noisy))
    directory.save(decoder, folder)


def used_s(pid: int) -> float:
    """Processor time of a process so far, by its clock (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def end_of(folder: Path, dtype: str, die_at: int, kill_at_s: float) -> tuple[int, float]:
    """Fork a run and wait for its end. While we have not asked for it, its number stays its own."""
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        disk = Killer(folder, die_at)
        disk.install(pytest.MonkeyPatch(), (directory, trained))
        code = 1
        try:
            run(folder, dtype)
            folder.joinpath("operations").write_text(str(len(disk.done)))
            code = 0
        finally:
            os._exit(code)
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if kill_at_s and used_s(pid) >= kill_at_s:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as warm:  # what is imported and built on first use is there afterwards
        run(Path(warm), "float32")
    for line in sys.stdin:
        order = json.loads(line)
        folder = Path(order.pop("folder"))
        print(json.dumps(end_of(folder, **order)), flush=True)
