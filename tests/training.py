"""Tiny token sets, models and jobs, and what spawned ranks run: for tests of the training room."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from artifacts import tiny_config
from torch import Tensor, nn

from microlm.core.artifact import open_artifact
from microlm.core.errors import UserError
from microlm.model import directory, lora
from microlm.model.transformer import Decoder, initialise
from microlm.text.shards import TokenSet
from microlm.train import objectives, optim
from microlm.train.batches import Batch, PackedRows
from microlm.train.checkpoint import Trained
from microlm.train.job import Job, LoopRecipe
from microlm.train.loop import train
from microlm.train.optim import Muon, OptimRecipe
from microlm.train.ranks import Ranks

VOCAB = 64
CONTEXT = 32


def token_set(
    name: str, samples: Sequence[Sequence[int]], masks: Sequence[Sequence[int]] | None = None
) -> TokenSet:
    """Samples as a token set in memory; with masks they are conversations."""
    tokens = np.concatenate([np.asarray(s, dtype="<u2") for s in samples])
    ends = np.cumsum([len(s) for s in samples])
    loss = None if masks is None else np.concatenate([np.asarray(m, dtype="u1") for m in masks])
    return TokenSet(name, tokens, loss, ends)


def random_set(name: str, seed: int, count: int = 60, conversations: bool = False) -> TokenSet:
    """`count` samples of 3 to 30 tokens that can be learnt: each token follows from the one before."""
    rng = np.random.default_rng(seed)
    samples = []
    for size in rng.integers(3, 30, size=count):
        start, step = rng.integers(3, VOCAB), rng.integers(1, 4)
        samples.append([int(3 + (start + i * step) % (VOCAB - 3)) for i in range(size)])
    masks = [[int(i >= len(s) // 2) for i in range(len(s))] for s in samples] if conversations else None
    return token_set(name, samples, masks)


def uneven_set(count: int = 60) -> TokenSet:
    """Conversations of which one teaches one token, the next all but one, the third more than a row holds."""
    plain = random_set("talk", 2, count, conversations=True)
    starts = np.concatenate(([0], plain.ends[:-1]))
    samples, masks = [], []
    for number, (start, end) in enumerate(zip(starts, plain.ends, strict=True)):
        ids = [*plain.tokens[start:end], *plain.tokens[start:end]] * (1 + number % 3 // 2)
        samples.append(ids)
        masks.append([int(i == len(ids) - 1 if number % 3 == 0 else i > 0) for i in range(len(ids))])
    return token_set("talk", samples, masks)


def tiny_decoder(seed: int = 0, **fields: Any) -> Decoder:
    """A fresh decoder as pretraining starts it."""
    config = tiny_config(vocab_size=VOCAB, max_position_embeddings=CONTEXT, **fields)
    decoder = Decoder(config)
    initialise(decoder, torch.Generator().manual_seed(seed))
    return decoder


def tiny_trained(
    seed: int = 0, steps: int = 0, decoder: Decoder | None = None, rates: OptimRecipe | None = None
) -> Trained:
    """A decoder and its optimizers, with some steps of noise behind them."""
    decoder = decoder or tiny_decoder(seed)
    trained = Trained(decoder, optim.make(decoder, rates or OptimRecipe()))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in trained.parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        trained.step()
    return trained


def states(trained: Trained) -> dict[str, Tensor]:
    """Copies of all that a run changes."""
    weights = {n: p.detach().clone() for n, p in trained.parameters.items()}
    return weights | {n: t.clone() for n, t in trained.states().items()}


def tiny_loop(steps: int = 10, **fields: Any) -> LoopRecipe:
    """Four rows of 32 tokens a step, in micro-batches of two."""
    sizes: dict[str, Any] = {
        "tokens": steps * 4 * CONTEXT, "context": CONTEXT, "batch_rows": 4, "micro_rows": 2,
        "dtype": "float32", "compile": False, "checkpoint_steps": 4, "log_steps": 3,
        "validation_steps": 6, "validation_rows": 4,
    }  # fmt: skip
    return LoopRecipe(**(sizes | fields))


def make_job(folder: Path, loop: LoopRecipe, seed: int = 0, **fields: Any) -> Job:
    """A job in a workspace folder; `fields` replace its parts."""
    for name in ("resume", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {
        "optim": OptimRecipe(warmup_steps=4),
        "objective": objectives.next_token,
        "train": PackedRows({"documents": random_set("documents", 0)}, {}, CONTEXT, seed),
        "validation": PackedRows({"documents": random_set("documents", 1)}, {}, CONTEXT, seed=0),
    }
    parts |= fields
    if not isinstance(parts["objective"], objectives.Objective):
        parts["objective"] = objectives.plain(parts["objective"])
    return Job(loop=loop, folder=folder, name="tiny", **parts)


class Disturbed:
    """The plain objective, with something done at its n-th call."""

    def __init__(self, call: int, act: Any) -> None:
        self.left, self.act = call, act

    def __call__(self, hidden: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.act()
        return objectives.next_token(hidden, decoder, batch)


def add_lora(decoder: Decoder, rank: int = 4, dropout: float = 0.0) -> Decoder:
    """The decoder with an adapter on every matrix."""
    lora.apply(decoder, lora.LoraConfig(rank, 2.0 * rank, dropout=dropout), torch.Generator().manual_seed(1))
    return decoder


def train_on_rank(ranks: Ranks, folder: Path, loop: LoopRecipe) -> None:
    """Train the tiny model on every rank; rank 0 saves it."""
    decoder = tiny_decoder()
    train(ranks, decoder, make_job(folder, loop))
    if ranks.rank == 0:
        directory.save(decoder, folder)


def train_sft_on_rank(ranks: Ranks, folder: Path, loop: LoopRecipe) -> None:
    """The same with conversations whose labels are far from even."""
    decoder = tiny_decoder()
    rows = PackedRows({"talk": uneven_set()}, {}, CONTEXT, 0, too_long="cut_left")
    train(ranks, decoder, make_job(folder, loop, train=rows, validation=None))
    if ranks.rank == 0:
        directory.save(decoder, folder)


def nan_on_rank(ranks: Ranks, folder: Path) -> None:
    """Train with `roll_back` while the second micro-batch of the seventh batch has no finite loss."""
    calls = 2 // ranks.size  # a step's calls of this rank
    spoiled = 7 * calls if ranks.rank == ranks.size - 1 else 0
    number = 0

    def objective(hidden: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
        nonlocal number
        number += 1
        loss = objectives.next_token(hidden, decoder, batch)
        return loss * torch.nan if number == spoiled else loss

    decoder = tiny_decoder()
    loop = tiny_loop(nonfinite="roll_back", validation_rows=0)
    train(ranks, decoder, make_job(folder, loop, objective=objective, validation=None))
    if ranks.rank == 0:
        directory.save(decoder, folder)


def stop_on_rank(ranks: Ranks, folder: Path, loop: LoopRecipe, call: int) -> None:
    """Train, but rank 0 meets a Ctrl-C in its n-th micro-batch."""
    act = (lambda: os.kill(os.getpid(), signal.SIGINT)) if ranks.rank == 0 else (lambda: None)
    train(ranks, tiny_decoder(), make_job(folder, loop, objective=Disturbed(call, act)))


def muon_on_rank(ranks: Ranks, folder: Path, dtype: torch.dtype) -> None:
    """Three steps of Muon on two matrices of one shape and one of another, the same gradients everywhere."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 16), (8, 16), (24, 8))
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = Muon(matrices, 0.1, 0.9, 0.1, dtype, ranks)
    for _ in range(3):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    flat = torch.cat([m.detach().flatten() for m in matrices])
    np.save(folder / f"{ranks.size}-{ranks.rank}.npy", flat.numpy())


def die_on_rank(ranks: Ranks, folder: Path, rank: int, number: int) -> None:
    """Train, but one rank kills itself in its third micro-batch."""
    act = (lambda: os.kill(os.getpid(), number)) if ranks.rank == rank else (lambda: None)
    train(ranks, tiny_decoder(), make_job(folder, tiny_loop(), objective=Disturbed(3, act)))


def refuse_on_rank(ranks: Ranks, rank: int) -> None:
    """One rank meets a user's mistake that the others do not see."""
    if ranks.rank == rank:
        raise UserError(f"rank {rank}: the file is not there; mount it")
    ranks.sum_(torch.zeros(1))


def fail_on_every_rank(ranks: Ranks) -> None:
    """Every rank meets the same mistake, after a first sum."""
    ranks.sum_(torch.zeros(1))
    raise UserError("mixture: no token set 'x'")


def disagree(ranks: Ranks) -> None:
    """Each rank found another checkpoint."""
    ranks.require_equal(ranks.rank, "the checkpoint that they found")


def do_nothing(ranks: Ranks, *_: Any) -> None:
    """Join and leave."""


class Bomb:
    """Ends the process that unpickles it: a worker that dies before it can say a word."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def sleep_long(ranks: Ranks) -> None:
    """Join, then be there for minutes."""
    for _ in range(6000):
        time.sleep(0.05)


def wait_with_pids(ranks: Ranks, folder: Path) -> None:
    """Say who we are, then wait to be killed."""
    (folder / f"rank-{ranks.rank}").write_text(str(os.getpid()))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    time.sleep(600)


def write_recipe(file: Path, data: str, output: str, **loop: Any) -> Path:
    """A pipeline from a data artifact to an adapter, as YAML."""
    sizes: dict[str, Any] = {
        "tokens": 12 * 4 * CONTEXT, "context": CONTEXT, "batch_rows": 4, "micro_rows": 2, "compile": False,
        "dtype": "float32", "checkpoint_steps": 3, "validation_steps": 6, "validation_rows": 4,
    }  # fmt: skip
    loop = sizes | loop
    shape = {
        "hidden_size": 32,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
    }
    stages = [
        {"stage": "tokenizer", "data": data, "vocab_size": 320, "assistant_name": None},
        {"stage": "tokenize", "name": "shards", "data": data, "tokenizer": "tokenizer"},
        {"stage": "pretrain", "shards": "shards", "architecture": shape, "loop": loop},
        {"stage": "sft", "model": "pretrain", "shards": "shards", "loop": loop},
        {
            "stage": "sft",
            "name": "lora",
            "model": "sft",
            "shards": "shards",
            "loop": loop,
            "lora": {"rank": 4},
        },
    ]
    parallel = {"processes": 2, "threads": 1}
    file.write_text(json.dumps({"output": output, "parallel": parallel, "stages": stages}))
    return file


STAGES = ("tokenizer", "shards", "pretrain", "sft", "lora")


def digests(output: Path) -> dict[str, str]:
    """Stage → digest of every finished stage of `write_recipe`."""
    return {
        n: open_artifact(str(output / n)).digest for n in STAGES if (output / n / "manifest.json").exists()
    }
