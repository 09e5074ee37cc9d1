"""One step's arithmetic: forward over packed rows, gradients of this rank's share, sums over all ranks.

Shapes: R rows, T tokens of context, D hidden. Batches come from the host and are moved where the decoder is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from microlm.core import runtime
from microlm.core.metrics import Progress
from microlm.model import lora
from microlm.model.attention import document_borders, spelled_attention, varlen_attention
from microlm.model.transformer import Decoder, masked_attention
from microlm.train.batches import Batch, document_mask
from microlm.train.job import Job, LoopRecipe
from microlm.train.objectives import Loss, Objective
from microlm.train.ranks import Ranks, Stopped

BlockCall = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _nothing() -> None:
    """No reason to stop."""


@dataclass(frozen=True)
class Forward:
    """`forward(input_ids [R,T], positions [R,T], seen) → hidden [R,T,D]`; `seen` says what a position sees.

    `check` is called between blocks, forward and backward, and may raise.
    """

    decoder: Decoder
    block_call: BlockCall
    document_mask: bool
    recomputed: bool
    spelled: bool
    check: Callable[[], None] = _nothing

    def __call__(self, input_ids: Tensor, positions: Tensor, seen: Tensor | None) -> Tensor:
        x, (cos, sin) = self.decoder.embed(input_ids, positions)
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # under an adapter too all blocks are alike, and compiled once
        for block in self.decoder.model.layers:
            self.check()
            if self.recomputed and torch.is_grad_enabled():
                x = _checkpointed(self.block_call, block, x, cos, sin, seen)
            else:
                x = self.block_call(block, x, cos, sin, seen)
            if x.requires_grad and self.check is not _nothing:
                x.register_hook(lambda _: self.check())
        return self.decoder.model.norm(x)

    def seen(self, batch: Batch) -> Tensor | None:
        """What attention needs: a mask, documents' borders (FlashAttention), or nothing.

        With nothing all before is seen; padding is at the end of a row, so nobody sees it.
        """
        dtype, device = self.decoder.compute_dtype, self.decoder.cos.device
        if not self.document_mask:
            length = batch.segments.shape[1]
            return document_mask(torch.zeros(1, length, device=device), dtype) if self.spelled else None
        if "trunk" in batch.extras:
            return document_mask(batch.segments.to(device), dtype, batch.extras["trunk"].to(device))
        if device.type == "cuda" and dtype == torch.bfloat16:
            return document_borders(batch.segments).to(device, non_blocking=True)
        return document_mask(batch.segments.to(device), dtype)


def make_forward(decoder: Decoder, loop: LoopRecipe) -> Forward:
    """The forward pass of a decoder that is where it will stay; one compiled block serves all layers."""
    spelled = loop.compiles() and decoder.cos.device.type == "cpu"
    block_call: BlockCall = _block
    if loop.compiles():
        runtime.set_env("TORCHINDUCTOR_CACHE_DIR", str(runtime.cache_dir() / "inductor"))
        block_call = torch.compile(_spelled_block if spelled else _block, dynamic=False)
    return Forward(decoder, block_call, loop.document_mask, loop.activation_checkpointing, spelled)


def _block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None) -> Tensor:
    """With PyTorch's kernels."""
    if seen is not None and seen.dim() == 1:
        return block(x, (cos, sin), 0, lambda layer, q, k, v: varlen_attention(q, k, v, seen))
    return block(x, (cos, sin), 0, lambda layer, q, k, v: masked_attention(q, k, v, seen))


def _spelled_block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None) -> Tensor:
    """With attention that the compiler sees."""
    assert seen is not None
    return block(x, (cos, sin), 0, lambda layer, q, k, v: spelled_attention(q, k, v, seen))


def _checkpointed(block_call: BlockCall, *args: Any) -> Tensor:
    """Keep a block's input alone, and compute the rest again in the backward pass; no generator is asked."""
    y: Tensor = checkpoint(block_call, *args, use_reentrant=False, preserve_rng_state=False)
    return y


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
            told = Progress(f"{job.name}: compiling", None, "passes") if turn == 0 else nullcontext()
            with told, lora.dropping(decoder, 0, 0, batch.input_ids.shape):
                losses(forward, decoder, batch, job.objective).total.backward()
        ranks.sum_(torch.zeros(1))
    for p in decoder.parameters():
        p.grad = None


def losses(forward: Forward, decoder: Decoder, batch: Batch, objective: Objective) -> Loss:
    """What a batch's rows teach, summed."""
    seen, here = forward.seen(batch), batch.to(decoder.cos.device)
    return objective.loss(forward(here.input_ids, here.positions, seen), decoder, here)


def accumulate(
    ranks: Ranks, forward: Forward, decoder: Decoder, batch: Batch, job: Job, stopped: Callable[[], bool]
) -> Tensor:
    """Gradients of this rank's micro-batches, over the count of the whole batch.

    Returns the sums of the loss and of the objective's metrics, float64 [1 + metrics]. Nothing more is
    computed once `stopped()`: a micro-batch may take longer than a person waits.
    """

    watched = replace(forward, check=raising(stopped))
    size = job.loop.micro_rows
    count = max(1, job.objective.count(batch))
    sums = torch.zeros(1 + len(job.objective.metrics), dtype=torch.float64, device=decoder.cos.device)
    seed = lora.draw_seed(decoder)
    with suppress(Stopped):
        for start in range(ranks.rank * size, len(batch.labels), ranks.size * size):
            rows = batch.rows(start, start + size)
            with lora.dropping(decoder, seed, start, rows.input_ids.shape):
                loss = losses(watched, decoder, rows, job.objective)
                (loss.total / count).backward()
            sums += torch.stack([part.detach().to(sums) for part in (loss.total, *loss.sums)])
    return sums


def raising(stopped: Callable[[], bool]) -> Callable[[], None]:
    """A check that raises Stopped once somebody wants to stop."""

    def check() -> None:
        if stopped():
            raise Stopped

    return check


def reduce(
    ranks: Ranks, parameters: list[nn.Parameter], sums: Tensor, stop: bool
) -> tuple[list[float], bool]:
    """Add up sums (in float64, as one rank does) and who wants to stop over all ranks; then gradients."""
    if ranks.size == 1:
        return sums.tolist(), stop
    *totals, stops = ranks.sum_(torch.cat([sums, sums.new_tensor([float(stop)])])).tolist()
    if stops:
        return totals, True
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = ranks.sum_(torch.cat([g.flatten() for g in grads]))
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)
    return totals, False
