"""Merging = the definition: the lowest rank first, of equals the leftmost, one merge at a time."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from microlm.text.bpe.apply import SHORT, find, join, pair_table

Ranks = dict[tuple[int, int], int]
LOW = 0xFFFF_FFFF


def by_definition(ids: list[int], ranks: Ranks) -> list[int]:
    while found := [(ranks[pair], x) for x, pair in enumerate(pairwise(ids)) if pair in ranks]:
        value, at = min(found)
        ids = [*ids[:at], value & LOW, *ids[at + 2 :]]
    return ids


def random_ranks(rng: random.Random, letters: int) -> Ranks:
    """Merges that often get in each other's way; half of the time in an order that makes little sense."""
    symbols, pairs = list(range(letters)), []
    while len(pairs) < 40:
        left, right = (symbols[min(int(rng.expovariate(0.25)), len(symbols) - 1)] for _ in range(2))
        if (left, right) not in pairs:
            pairs.append((left, right))
            symbols.append(len(symbols))
    order = list(range(40))
    if rng.random() < 0.5:
        rng.shuffle(order)
    return {pair: order[x] << 32 | letters + x for x, pair in enumerate(pairs)}


@pytest.mark.parametrize("size", [0, 1, 2, 3, 17, SHORT - 1, SHORT, SHORT + 1, 300])
def test_join_is_the_definition(size: int) -> None:
    for seed in range(60):
        rng = random.Random(f"{seed} {size}")
        letters = 2 + seed % 3
        ranks = random_ranks(rng, letters)
        start = [rng.randrange(letters) for _ in range(size)]
        ids = np.array([*start, -7], dtype=np.int32)
        count = join(ids, np.empty(size, dtype=np.uint64), size, pair_table(ranks))
        assert ids[:count].tolist() == by_definition(start, ranks)
        assert ids[-1] == -7


def test_the_table_holds_what_was_put_in() -> None:
    rng = random.Random(0)
    ranks = {(rng.randrange(1 << 21), rng.randrange(1 << 21)): x << 32 | x for x in range(20_000)}
    rows = pair_table(ranks)
    assert len(rows) >= 2.5 * len(ranks)
    assert all(find(rows, *pair) == value for pair, value in ranks.items())
    assert find(rows, 1 << 21, 0) == find(rows, 0, 1 << 21) == 0xFFFF_FFFF_FFFF_FFFF
    assert find(pair_table({}), 0, 0) == 0xFFFF_FFFF_FFFF_FFFF
