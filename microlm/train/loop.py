"""The one training loop: batches + objective + optimizers → trained weights, resumable at every checkpoint.

Enters: a decoder and a job. Leaves: the decoder trained in place, rows of metrics.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from microlm.core import runtime, storage
from microlm.core.errors import CheckFailed, UserError
from microlm.model.config import ModelConfig
from microlm.model.transformer import Decoder
from microlm.train import optim
from microlm.train.batches import Batch
from microlm.train.checkpoint import Position, Saver, Trained, random_state, restore, set_random_state
from microlm.train.job import Job
from microlm.train.ranks import Ranks, Stopped
from microlm.train.reporter import Reporter
from microlm.train.step import accumulate, make_forward, raising, reduce, warm_up

NONFINITE = "nonfinite.jsonl"


def train(ranks: Ranks, decoder: Decoder, job: Job) -> Position:
    """Train to the end, from the last checkpoint if any; Ctrl-C saves, then raises KeyboardInterrupt.

    A step that a Ctrl-C meets is given up: it is done again when the run goes on.
    """
    loop = job.loop
    require_room(decoder.config, job.name, loop.context)
    decoder.to(runtime.device())
    runtime.keep_memory()
    trained = Trained(decoder, optim.make(decoder, job.optim, ranks))
    parameters = list(trained.parameters.values())
    at = _resume(ranks, trained, job)
    forward = make_forward(decoder, loop)
    stop = False
    with Saver(trained, job.checkpoints, ranks.rank == 0, saved=at.step or None) as saver:
        warm_up(ranks, forward, decoder, job)
        with (
            _stop_flag(ranks) as stopped,
            job.train.batches(loop.batch_rows, at.data, loop.workers) as stream,
            Reporter(ranks, job, at, stream, decoder, stopped) as report,
        ):
            at.data = stream.state()
            stream.watch(raising(stopped))
            report.begin(forward)
            set_random_state(at.random)  # what people see changes nothing
            saver.save(at, due=loop.nonfinite == "roll_back" and at.step == 0)
            while at.step < loop.steps:
                saver.check()
                factor = optim.set_rates(trained.optimizers, job.optim, at.step, loop.steps)
                try:
                    batch = next(stream)
                except Stopped:
                    stop = True
                    break
                sums = accumulate(ranks, forward, decoder, batch, job, stopped)
                totals, stop = reduce(ranks, parameters, sums, stopped())
                if stop:
                    break
                mean, *means = (total / max(1, job.objective.count(batch)) for total in totals)
                norm = float(torch.nn.utils.clip_grad_norm_(parameters, job.optim.clip_norm))
                if math.isfinite(mean) and math.isfinite(norm):
                    trained.step()
                    at.step += 1
                    at.tokens += batch.labels.numel()
                    at.data, at.random = stream.state(), random_state()
                    report.step([mean, *means], factor, norm, forward)
                    set_random_state(at.random)
                    saver.save(at, due=at.step % loop.checkpoint_steps == 0 and at.step < loop.steps)
                else:
                    trained.forget_gradients()
                    _leave_out(ranks, trained, saver, job, at, batch, {"loss": mean, "grad_norm": norm})
                    at.data, at.random = stream.state(), random_state()
                    report.rewind()
            if stop or stopped():
                saver.save(at, due=at.step > 0)
                saver.wait()
                raise KeyboardInterrupt
    runtime.give_memory_back()
    return at


def _resume(ranks: Ranks, trained: Trained, job: Job) -> Position:
    """The position of the last checkpoint, or the first one."""
    quiet = ranks.rank != 0
    allow = job.loop.allow_mismatch
    found = restore(job.resume, trained, job.fingerprint, allow_mismatch=allow, quiet=quiet)
    at = found or Position(random=random_state())
    ranks.require_equal(at.step, "the checkpoint that they found")
    return at


def _leave_out(
    ranks: Ranks,
    trained: Trained,
    saver: Saver,
    job: Job,
    at: Position,
    batch: Batch,
    found: dict[str, float],
) -> None:
    """A step whose loss or gradient is not finite is not applied: end, go on, or go back and then on."""
    numbers: dict[str, list[int]] = {}
    for name, sample in sorted({s for row in batch.samples for s in row}):
        numbers.setdefault(name, []).append(sample)
    event: dict[str, Any] = {"step": at.step, "policy": job.loop.nonfinite}
    event |= {k: str(v) for k, v in found.items()} | {"samples": numbers}
    earlier = at.nonfinite
    at.nonfinite = [*earlier, event]
    at.left_out += 1
    file = job.logs / NONFINITE
    if job.loop.nonfinite == "roll_back" and len(earlier) < job.loop.nonfinite_limit:
        _roll_back(ranks, trained, saver, job, at)
    if ranks.rank == 0:
        storage.write_atomic(file, "".join(json.dumps(e) + "\n" for e in at.nonfinite).encode())
    what = next(f"{k} is {v}" for k, v in found.items() if not math.isfinite(v))
    where = f"{job.name}: {what} at step {event['step']}"
    if job.loop.nonfinite == "stop":
        raise CheckFailed(
            f"{where}; lower the rates (optim.*), look at the samples that {file} lists, or set "
            "loop.nonfinite=skip (or roll_back), and run again"
        )
    if len(earlier) >= job.loop.nonfinite_limit:
        raise CheckFailed(
            f"{where}, after {len(earlier)} such steps (loop.nonfinite_limit; {file} lists them); "
            "lower the rates (optim.*) and run again"
        )


def _roll_back(ranks: Ranks, trained: Trained, saver: Saver, job: Job, at: Position) -> None:
    """Return to the last checkpoint, or to one before it if no step was made since the last return.

    The batches since then stay left out, as PaLM's were (2204.02311, 5.1): the steps before a loss that
    is not finite may have caused it.
    """
    saver.wait()
    ranks.sum_(torch.zeros(1))  # the others read what rank 0 has written
    last = next((e["back_to"] for e in reversed(at.nonfinite) if "back_to" in e), None)
    before = at.step if last == at.step else None
    found = restore(
        job.resume, trained, job.fingerprint, allow_mismatch=True, before=before, quiet=ranks.rank != 0
    )
    if found is None:
        raise CheckFailed(
            f"{job.name}: no checkpoint before step {at.step} is left to go back to; "
            "lower the rates (optim.*) and start anew"
        )
    at.nonfinite[-1]["back_to"] = found.step
    found.left_out = at.left_out + at.step - found.step
    found.nonfinite, found.mismatches = at.nonfinite, at.mismatches
    at.become(found)
    set_random_state(at.random)
    saver.forget()


def require_room(config: ModelConfig, name: str, context: int) -> None:
    """Refuse rows that are longer than the model's window."""
    positions = config.max_position_embeddings
    if context > positions:
        raise UserError(
            f"{name}: loop.context {context} is longer than the model's {positions} positions; "
            "lower it, or pretrain with larger architecture.max_positions"
        )


@contextmanager
def _stop_flag(ranks: Ranks) -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM on any rank into a flag that all read in their steps."""
    hit = False

    def remember(number: int, frame: object) -> None:
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True

    def stopped() -> bool:
        if hit and not ranks.told_stop():
            ranks.tell_stop()
        return hit or ranks.told_stop()

    try:
        before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody to interrupt
        before = {}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
