"""Tiny preference sets that can be learnt, and rows of them: for tests of DPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from training import CONTEXT, VOCAB, make_job, token_set

from microlm.text.shards import TokenSet
from microlm.train.batches.pairs import PairRows, pair_rows
from microlm.train.job import Job, LoopRecipe
from microlm.train.objectives import dpo

Side = tuple[list[int], list[int]]


def random_pairs(name: str, seed: int, count: int = 40, longest: int = 7) -> TokenSet:
    """Pairs with prompts and answers of 2 to `longest` tokens; chosen answers rise, rejected ones fall."""
    rng = np.random.default_rng(seed)
    sides: list[Side] = []
    for _ in range(count):
        prompt = rng.integers(3, VOCAB, size=rng.integers(2, longest)).tolist()
        for step in (1, -1):
            size = int(rng.integers(2, longest))
            answer = [int(3 + (prompt[-1] - 3 + step * (i + 1)) % (VOCAB - 3)) for i in range(size)]
            sides.append(([*prompt, *answer, 2, 1], [0] * len(prompt) + [1] * size + [1, 0]))
    return token_set(name, [ids for ids, _ in sides], [mask for _, mask in sides])


def sides_of(tokens: TokenSet) -> list[Side]:
    """Ids and mask of every conversation."""
    assert tokens.loss is not None
    columns = (np.split(np.asarray(column), tokens.ends)[:-1] for column in (tokens.tokens, tokens.loss))
    return [(ids.tolist(), mask.tolist()) for ids, mask in zip(*columns, strict=True)]


def some_rows(seed: int = 0, count: int = 40) -> PairRows:
    """Rows of one set of random pairs."""
    return pair_rows({"chat": random_pairs("chat", seed, count)}, {}, CONTEXT, seed)


def dpo_job(folder: Path, loop: LoopRecipe, **fields: Any) -> Job:
    """A job on random pairs, held-out ones too."""
    parts: dict[str, Any] = {
        "train": some_rows(0), "validation": some_rows(1, 12), "objective": dpo.make(0.5),
    }  # fmt: skip
    return make_job(folder, loop, **(parts | fields))
