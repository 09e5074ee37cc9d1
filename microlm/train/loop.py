"""The one training loop: batches + objective + optimizers → trained weights, resumable at every checkpoint.

Enters: a decoder, packed rows, an objective. Leaves: the decoder trained in place, rows of metrics.
"""

from __future__ import annotations

import math
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from microlm.core import runtime
from microlm.core.artifact import LOGS, RESUME
from microlm.core.errors import CheckFailed, UserError
from microlm.core.metrics import FILE, MetricsLog, Progress, read_metrics
from microlm.core.recipe import Recipe, unkeyed
from microlm.model.transformer import Decoder, masked_attention, spelled_attention
from microlm.train import checkpoint, optim
from microlm.train.batches import Batch, PackedRows, document_mask
from microlm.train.checkpoint import Position
from microlm.train.objectives import Objective
from microlm.train.ranks import Ranks

Forward = Callable[[Tensor, Tensor], Tensor]


class LoopRecipe(Recipe):
    """How long, how much at once, how precise."""

    tokens: int = Field(default=2_000_000, ge=1, description="positions to train on, padding included")
    context: int = Field(default=256, ge=16, description="tokens of a row")
    batch_rows: int = Field(default=16, ge=1, description="rows of a step, over all processes")
    micro_rows: int = Field(default=8, ge=1, description="rows of one forward pass")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="precision of the products"
    )
    compile: bool = Field(default=True, description="torch.compile (faster; needs a C++ compiler)")
    checkpoint_steps: int = unkeyed(100, ge=1, description="steps between resume checkpoints")
    log_steps: int = unkeyed(10, ge=1, description="steps between logged rows")
    validation_steps: int = unkeyed(200, ge=1, description="steps between validations")
    validation_rows: int = unkeyed(32, ge=0, description="rows of one validation; 0 for none")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.tokens // (self.batch_rows * self.context))

    def compiles(self) -> bool:
        """Whether blocks are compiled: asked for, and possible here."""
        return self.compile and runtime.missing_for_compile() is None

    def compute_dtype(self) -> torch.dtype:
        """The torch dtype; auto takes bf16 where it is native."""
        if self.dtype == "auto":
            return torch.bfloat16 if runtime.has_fast_bfloat16() else torch.float32
        return runtime.torch_dtype(self.dtype)


@dataclass
class Job:
    """What a run needs besides the decoder; `folder` is the stage's workspace."""

    loop: LoopRecipe
    optim: optim.OptimRecipe
    objective: Objective
    train: PackedRows
    validation: PackedRows | None
    folder: Path
    name: str

    @property
    def resume(self) -> Path:
        """Where the checkpoints lie."""
        return self.folder / RESUME

    @property
    def logs(self) -> Path:
        """Where the metrics lie."""
        return self.folder / LOGS


def train(ranks: Ranks, decoder: Decoder, job: Job) -> Position:
    """Train to the end, from the last checkpoint if any; Ctrl-C saves, then raises KeyboardInterrupt."""
    loop = job.loop
    _require_room(decoder, job)
    runtime.keep_memory()
    parameters = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
    optimizers = optim.make(decoder, job.optim, ranks)
    at = checkpoint.restore(job.resume, parameters, optimizers)
    ranks.require_equal(at.step, "the checkpoint that they found")
    forward = make_forward(decoder, loop)
    _warm_up(ranks, forward, decoder, job)
    stream = job.train.batches(loop.batch_rows, start=at.step)
    with _stop_flag() as stopped, _Reporter(ranks, job, at) as report:
        report.validate_first(forward, decoder)
        while at.step < loop.steps:
            factor = optim.set_rates(optimizers, job.optim, at.step, loop.steps)
            batch = next(stream)
            loss = _accumulate(ranks, forward, decoder, batch, job)
            total, stop = _reduce(ranks, list(parameters.values()), loss, stopped())
            mean = total / max(1, batch.label_count)
            if not math.isfinite(mean):
                where = f"{job.name}: loss is {mean} at step {at.step}"
                raise CheckFailed(f"{where}; lower the rates (optim.*) and run again")
            torch.nn.utils.clip_grad_norm_(parameters.values(), job.optim.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            at.step += 1
            at.tokens += loop.batch_rows * loop.context
            report.step(mean, factor, forward, decoder)
            stop = stop or (at.step == loop.steps and stopped())  # nobody sums after the last step
            due = at.step % loop.checkpoint_steps == 0 and at.step < loop.steps
            if ranks.rank == 0 and (stop or due):
                checkpoint.save(job.resume, parameters, optimizers, at)
            if stop:
                raise KeyboardInterrupt
    runtime.give_memory_back()
    return at


def _require_room(decoder: Decoder, job: Job) -> None:
    positions = decoder.config.max_position_embeddings
    if job.loop.context > positions:
        raise UserError(
            f"{job.name}: loop.context {job.loop.context} is longer than the model's {positions} positions; "
            "lower it, or pretrain with larger architecture.max_positions"
        )


def make_forward(decoder: Decoder, loop: LoopRecipe) -> Forward:
    """`(input_ids [R,T], mask [R,1,T,T]) → hidden [R,T,D]`; one block is compiled and serves all layers."""
    positions = torch.arange(loop.context, device=decoder.cos.device)
    block_call = _block
    if loop.compiles():
        runtime.set_env("TORCHINDUCTOR_CACHE_DIR", str(runtime.cache_dir() / "inductor"))
        block_call = torch.compile(_fused_block, dynamic=False)

    def forward(input_ids: Tensor, mask: Tensor) -> Tensor:
        x, (cos, sin) = decoder.embed(input_ids, positions)
        for block in decoder.model.layers:
            x = block_call(block, x, cos, sin, mask)
        return decoder.model.norm(x)

    return forward


def _block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    return block(x, (cos, sin), 0, lambda layer, q, k, v: masked_attention(q, k, v, mask))


def _fused_block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    return block(x, (cos, sin), 0, lambda layer, q, k, v: spelled_attention(q, k, v, mask))


def _warm_up(ranks: Ranks, forward: Forward, decoder: Decoder, job: Job) -> None:
    """Compile on rank 0 alone; the others then find its kernels in the cache: half the work on few cores."""
    if not job.loop.compiles():
        if job.loop.compile and ranks.rank == 0:
            lacks = runtime.missing_for_compile()
            warnings.warn(f"{job.name}: not compiled, so slower: this machine lacks {lacks}", stacklevel=2)
        return
    batch = next(job.train.batches(job.loop.batch_rows)).rows(0, job.loop.micro_rows)
    for turn in range(min(2, ranks.size)):
        if (ranks.rank == 0) == (turn == 0):
            with Progress(f"{job.name}: compiling", None, "passes") if turn == 0 else nullcontext():
                _losses(forward, decoder, batch, job.objective).backward()
        ranks.sum_(torch.zeros(1))
    for p in decoder.parameters():
        p.grad = None


def _losses(forward: Forward, decoder: Decoder, batch: Batch, objective: Objective) -> Tensor:
    mask = document_mask(batch.segments, decoder.compute_dtype)
    return objective(forward(batch.input_ids, mask), decoder, batch)


def _accumulate(ranks: Ranks, forward: Forward, decoder: Decoder, batch: Batch, job: Job) -> Tensor:
    """Gradients of this rank's micro-batches, over the labels of the whole batch; returns the summed loss."""
    size = job.loop.micro_rows
    total = torch.zeros(())
    for number, start in enumerate(range(0, job.loop.batch_rows, size)):
        if number % ranks.size == ranks.rank:
            loss = _losses(forward, decoder, batch.rows(start, start + size), job.objective)
            (loss / max(1, batch.label_count)).backward()
            total += loss.detach()
    return total


def _reduce(ranks: Ranks, parameters: list[nn.Parameter], loss: Tensor, stop: bool) -> tuple[float, bool]:
    """Sum gradients, loss and the wish to stop over all ranks, in one message."""
    if ranks.size == 1:
        return float(loss), stop
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([*(g.flatten() for g in grads), torch.stack([loss, torch.tensor(float(stop))])])
    ranks.sum_(flat)
    pieces = flat[:-2].split([p.numel() for p in parameters])
    for p, piece in zip(parameters, pieces, strict=True):
        p.grad = piece.view_as(p)
    return float(flat[-2]), bool(flat[-1] > 0)


def validation_loss(forward: Forward, decoder: Decoder, job: Job) -> float:
    """Mean loss of the first validation rows, in nats per label.

    Gradients stay on, unused: without them torch.compile would build every block a second time.
    """
    assert job.validation is not None
    total, count = 0.0, 0
    stream = job.validation.batches(job.loop.micro_rows)
    for _ in range(max(1, job.loop.validation_rows // job.loop.micro_rows)):
        batch = next(stream)
        total += float(_losses(forward, decoder, batch, job.objective).detach())
        count += batch.label_count
    return total / max(1, count)


class _Reporter:
    """Rank 0's progress line, metrics and history; silent on the others."""

    def __init__(self, ranks: Ranks, job: Job, at: Position) -> None:
        self.job, self.at, self.active = job, at, ranks.rank == 0
        if self.active:
            total = job.loop.steps * job.loop.batch_rows * job.loop.context
            self.bar = Progress(job.name, total, "tokens", start=at.tokens)
            self.log = _reopen_log(job.logs, at)

    def __enter__(self) -> _Reporter:
        if self.active:
            self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.active:
            self.bar.__exit__(*error)
            self.log.close()

    def validate_first(self, forward: Forward, decoder: Decoder) -> None:
        """The loss before any step, so that a curve starts where the run did."""
        if self.at.step == 0:
            self._validate(forward, decoder, {"tokens": 0.0})

    def step(self, loss: float, factor: float, forward: Forward, decoder: Decoder) -> None:
        """Report a finished step."""
        if not self.active:
            return
        loop = self.job.loop
        recent = self.at.recent = [*self.at.recent, loss][-loop.log_steps :]
        self.bar.update(loop.batch_rows * loop.context, loss=sum(recent) / len(recent))
        last = self.at.step == loop.steps
        if self.at.step % loop.log_steps and not last:
            return
        row = {"tokens": float(self.at.tokens), "loss": sum(recent) / len(recent), "rate": factor}
        if last or self.at.step % loop.validation_steps == 0:
            self._validate(forward, decoder, row)
        else:
            self._write(row)

    def _validate(self, forward: Forward, decoder: Decoder, row: dict[str, float]) -> None:
        if self.active and self.job.validation is not None and self.job.loop.validation_rows:
            self._write(row | {"validation_loss": validation_loss(forward, decoder, self.job)})
        elif self.active and len(row) > 1:
            self._write(row)

    def _write(self, row: dict[str, float]) -> None:
        self.at.history.append({"step": float(self.at.step), **row})
        self.log.log(self.at.step, **row)


def _reopen_log(logs: Path, at: Position) -> MetricsLog:
    """The metrics as they stood at the checkpoint: the file's rows (they hold the times) if none is lost."""
    kept = [row for row in read_metrics(logs / FILE) if row["step"] <= at.step]
    if at.step and len(kept) == len(at.history):
        return MetricsLog(logs, at.step + 1)
    log = MetricsLog(logs)
    for row in at.history:
        log.log(int(row["step"]), **{k: v for k, v in row.items() if k != "step"})
    return log


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
