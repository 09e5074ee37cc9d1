"""GRPO runs that are killed: forks a run, lets it die by SIGKILL while it answers, goes on with it.

Called with a model's directory, a folder, the recipe's fields as JSON and the sets of answers that are not
survived; leaves `whole` (undisturbed) and `killed` beside each other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from answering import answering_job, recipe  # noqa: E402

from microlm.cli.training.rollouts import open_rollout  # noqa: E402
from microlm.core import runtime  # noqa: E402
from microlm.core.records import Completion, Sampling  # noqa: E402
from microlm.model import directory  # noqa: E402
from microlm.train.batches.answers import Rollout  # noqa: E402
from microlm.train.batches.rollouts import RolloutRows  # noqa: E402
from microlm.train.loop import train  # noqa: E402
from microlm.train.ranks import Ranks  # noqa: E402


class Mortal:
    """Answers as another does, but for the n-th call: in the middle of that, the process dies."""

    def __init__(self, inner: Rollout, die_at: int) -> None:
        self.inner, self.left = inner, die_at

    def __call__(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], check: Callable[[], None]
    ) -> list[Completion]:
        self.left -= 1
        tokens = 0

        def count() -> None:
            nonlocal tokens
            tokens += 1
            if self.left == 0 and tokens == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            check()

        return self.inner(prompts, samplings, count)


def run(folder: Path, model: Path, fields: dict[str, Any], die_at: int) -> None:
    """Train; die in the `die_at`-th set of answers."""
    asked = recipe(**fields)
    runtime.set_seed(0)
    decoder, job = answering_job(folder, model, asked, Ranks(0, 1))
    rows = job.train
    assert isinstance(rows, RolloutRows)
    mortal = Mortal(open_rollout(model, decoder, asked), die_at)
    rows.respondent = type(rows.respondent)(
        mortal, rows.respondent.judges, rows.respondent.ranks, rows.respondent.max_tokens
    )
    train(Ranks(0, 1), decoder, job)
    directory.save(decoder, folder)


def forked(*args: Any) -> int:
    """How a run in a process of its own ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(*args)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, folder, fields, deaths = Path(sys.argv[1]), Path(sys.argv[2]), *map(json.loads, sys.argv[3:])
    run(folder / "warm", model, fields | {"steps": 1}, 0)  # what is imported and built is there afterwards
    ends = [forked(folder / "whole", model, fields, 0)]
    ends += [forked(folder / "killed", model, fields, n) for n in (*deaths, 0)]
    print(json.dumps(ends))
