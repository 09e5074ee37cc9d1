"""One step's arithmetic: forward over packed rows, gradients of this rank's share, sums over all ranks.

Shapes: R rows, T tokens of context, D hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from microlm.core import runtime
from microlm.core.metrics import Progress
from microlm.model.transformer import Decoder, masked_attention, spelled_attention
from microlm.train.batches import Batch, document_mask
from microlm.train.job import Job, LoopRecipe
from microlm.train.objectives import Objective
from microlm.train.ranks import Ranks

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_forward(decoder: Decoder, loop: LoopRecipe) -> Forward:
    """`(input_ids [R,T], positions [R,T], mask [R,1,T,T]) → hidden [R,T,D]`; one compiled block for all."""
    block_call = _block
    if loop.compiles():
        runtime.set_env("TORCHINDUCTOR_CACHE_DIR", str(runtime.cache_dir() / "inductor"))
        block_call = torch.compile(_fused_block, dynamic=False)

    def forward(input_ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x, (cos, sin) = decoder.embed(input_ids, positions)
        for block in decoder.model.layers:
            x = block_call(block, x, cos, sin, mask)
        return decoder.model.norm(x)

    return forward


def _block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    return block(x, (cos, sin), 0, lambda layer, q, k, v: masked_attention(q, k, v, mask))


def _fused_block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    return block(x, (cos, sin), 0, lambda layer, q, k, v: spelled_attention(q, k, v, mask))


def warm_up(ranks: Ranks, forward: Forward, decoder: Decoder, job: Job) -> None:
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
                losses(forward, decoder, batch, job.objective).backward()
        ranks.sum_(torch.zeros(1))
    for p in decoder.parameters():
        p.grad = None


def losses(forward: Forward, decoder: Decoder, batch: Batch, objective: Objective) -> Tensor:
    mask = document_mask(batch.segments, decoder.compute_dtype)
    return objective(forward(batch.input_ids, batch.positions, mask), decoder, batch)


def accumulate(
    ranks: Ranks, forward: Forward, decoder: Decoder, batch: Batch, job: Job, stopped: Callable[[], bool]
) -> Tensor:
    """Gradients of this rank's micro-batches, over the labels of the whole batch; returns the summed loss.

    Nothing more is computed once `stopped()`: a step may take longer than a person waits.
    """
    size = job.loop.micro_rows
    total = torch.zeros(())
    for number, start in enumerate(range(0, job.loop.batch_rows, size)):
        if number % ranks.size == ranks.rank and not stopped():
            loss = losses(forward, decoder, batch.rows(start, start + size), job.objective)
            (loss / max(1, batch.label_count)).backward()
            total += loss.detach()
    return total


def reduce(ranks: Ranks, parameters: list[nn.Parameter], loss: Tensor, stop: bool) -> tuple[float, bool]:
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
