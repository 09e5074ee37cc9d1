"""Weights, batches and the loop's own step, for the benchmarks of training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microlm.core import runtime
from microlm.model.config import ModelConfig
from microlm.model.presets import PRESETS
from microlm.model.transformer import Decoder, initialise
from microlm.text.shards import TokenSet
from microlm.train import objectives, optim
from microlm.train.batches import Batch, PackedRows
from microlm.train.checkpoint import Trained
from microlm.train.job import Job, LoopRecipe
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks
from microlm.train.step import accumulate, make_forward

RATE = 3e-4
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
DOCUMENT = 512  # mean tokens of a document where there are several

Step = Callable[[], float]
"""Makes one optimizer step and returns the mean loss before it."""


@lru_cache(maxsize=1)
def state_of(config: ModelConfig) -> dict[str, Tensor]:
    """The weights that every variant starts from, under their Hugging Face names."""
    decoder = Decoder(config)
    initialise(decoder, torch.Generator().manual_seed(0), plain=True)
    return {name: p.detach() for name, p in decoder.named_parameters()}


def rows_of(config: ModelConfig, context: int, documents: bool, tokens: int = 2_000_000) -> PackedRows:
    """Rows of random tokens: one endless document, or documents of many lengths, each seen alone."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, config.vocab_size, tokens).astype("<u2")
    ends = np.array([tokens])
    if documents:
        ends = np.cumsum(rng.geometric(1 / DOCUMENT, tokens // DOCUMENT // 2) + 1)
    sets = {"documents": TokenSet("documents", ids, None, ends)}
    return PackedRows(sets, {}, context, 0, document_mask=documents)


def batch_of(config: ModelConfig, rows: int, context: int) -> Batch:
    """Rows that hold one document each, every position with a label."""
    return next(rows_of(config, context, documents=False).batches(rows))


def job_of(
    config: ModelConfig,
    batch: Batch,
    *,
    matrices: str = "adamw",
    micro_rows: int = 0,
    documents: bool = False,
    **fields: Any,
) -> Step:
    """The loop's own step over one batch, as `train` makes it; all rows at once without `micro_rows`."""
    count, context = batch.input_ids.shape
    loop = LoopRecipe(
        context=context, batch_rows=count, micro_rows=micro_rows or count, document_mask=documents,
        **{"dtype": "bfloat16", **fields},
    )  # fmt: skip
    rows = rows_of(config, context, documents, 8 * batch.input_ids.numel())
    step = loop_step(config, loop, rows, matrices)
    return lambda: step(batch)


def loop_step(
    config: ModelConfig, loop: LoopRecipe, rows: PackedRows, matrices: str = "adamw"
) -> Callable[[Batch], float]:
    """The loop's own step over any batch; it returns the mean loss before it."""
    rates = OptimRecipe(
        matrices=matrices, matrix_lr=RATE, embedding_lr=RATE, head_lr=RATE,
        adam_beta1=ADAMW["betas"][0], adam_beta2=ADAMW["betas"][1], adam_eps=ADAMW["eps"],
    )  # fmt: skip
    decoder = Decoder(config, loop.compute_dtype())
    decoder.load_state_dict(state_of(config), strict=False)
    decoder.to(runtime.device())
    runtime.keep_memory()
    trained = Trained(decoder, optim.make(decoder, rates))
    objective = objectives.make(loop.compiles())
    job = Job(loop, rates, objective, rows, None, Path(tempfile.gettempdir()), "step")
    forward, alone = make_forward(decoder, loop), Ranks(0, 1)
    parameters = list(trained.parameters.values())

    def step(batch: Batch) -> float:
        sums = accumulate(alone, forward, decoder, batch, job, lambda: False)
        torch.nn.utils.clip_grad_norm_(parameters, rates.clip_norm)
        trained.step()
        return float(sums[0]) / batch.label_count

    return step


def gpu_step() -> tuple[Step, float, int]:
    """A step of the 25.8M model on 512-token documents with Muon; its FLOPs and positions."""
    from microlm.train.reporter.speed import position_flops

    config, rows, context = PRESETS["26m"].config(6400, 2048, 1e6), 256, 512
    batch = next(rows_of(config, context, documents=True, tokens=8 * rows * context).batches(rows)).pinned()
    body, head = position_flops(Decoder(config), context)
    step = job_of(config, batch, matrices="muon", micro_rows=128, documents=True)
    return step, rows * context * body + batch.label_count * head, rows * context
