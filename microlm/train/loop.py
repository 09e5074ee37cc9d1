"""The one training loop: batches + objective + optimizers → trained weights, resumable at every checkpoint.

Enters: a decoder and a job. Leaves: the decoder trained in place, rows of metrics.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from microlm.core.errors import CheckFailed, UserError
from microlm.model.transformer import Decoder
from microlm.train import checkpoint, optim
from microlm.train.checkpoint import Position
from microlm.train.job import Job
from microlm.train.ranks import Ranks
from microlm.train.reporter import Reporter
from microlm.train.step import accumulate, make_forward, reduce, warm_up


def train(ranks: Ranks, decoder: Decoder, job: Job) -> Position:
    """Train to the end, from the last checkpoint if any; Ctrl-C saves, then raises KeyboardInterrupt."""
    loop = job.loop
    _require_room(decoder, job)
    parameters = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
    optimizers = optim.make(decoder, job.optim, ranks)
    at = checkpoint.restore(job.resume, parameters, optimizers)
    ranks.require_equal(at.step, "the checkpoint that they found")
    forward = make_forward(decoder, loop)
    warm_up(ranks, forward, decoder, job)
    with (
        _stop_flag() as stopped,
        job.train.batches(loop.batch_rows, at.data, loop.workers) as stream,
        Reporter(ranks, job, at, stream) as report,
    ):
        report.validate_first(forward, decoder)
        while at.step < loop.steps:
            factor = optim.set_rates(optimizers, job.optim, at.step, loop.steps)
            batch = next(stream)
            loss = accumulate(ranks, forward, decoder, batch, job)
            total, stop = reduce(ranks, list(parameters.values()), loss, stopped())
            mean = total / max(1, batch.label_count)
            if not math.isfinite(mean):
                where = f"{job.name}: loss is {mean} at step {at.step}"
                raise CheckFailed(f"{where}; lower the rates (optim.*) and run again")
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), job.optim.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            at.step += 1
            at.tokens += loop.batch_rows * loop.context
            at.data = stream.state()
            report.step(mean, factor, float(norm), forward, decoder)
            stop = stop or (at.step == loop.steps and stopped())  # nobody sums after the last step
            due = at.step % loop.checkpoint_steps == 0 and at.step < loop.steps
            if ranks.rank == 0 and (stop or due):
                checkpoint.save(job.resume, parameters, optimizers, at)
            if stop:
                raise KeyboardInterrupt
    return at


def _require_room(decoder: Decoder, job: Job) -> None:
    positions = decoder.config.max_position_embeddings
    if job.loop.context > positions:
        raise UserError(
            f"{job.name}: loop.context {job.loop.context} is longer than the model's {positions} positions; "
            "lower it, or pretrain with larger architecture.max_positions"
        )


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag that the loop reads between steps."""
    hit = False

    def remember(number: int, frame: object) -> None:
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True

    try:
        before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody to interrupt
        before = {}
    try:
        yield lambda: hit
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
