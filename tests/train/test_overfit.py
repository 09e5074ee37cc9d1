"""What a trial on one batch says, and that it is one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import CONTEXT, make_job, random_set, tiny_decoder, tiny_loop

from microlm.core.errors import CheckFailed
from microlm.train.batches import PackedRows
from microlm.train.loop import train
from microlm.train.overfit import OneBatch, Overfit, require_overfit
from microlm.train.ranks import Ranks


def test_the_same_batch_comes_again() -> None:
    rows = PackedRows({"documents": random_set("documents", 0)}, {}, CONTEXT, 0)
    again = OneBatch(rows, 2)
    with rows.batches(2) as plain, again.batches(2) as stream:
        first, second = next(plain), next(plain)
        for _ in range(3):
            assert torch.equal(next(stream).input_ids, first.input_ids)
        assert not torch.equal(first.input_ids, second.input_ids)


def test_the_loop_learns_it(tmp_path: Path) -> None:
    job = make_job(
        tmp_path, tiny_loop(100, batch_rows=2, micro_rows=2, tokens=100 * 2 * CONTEXT), validation=None
    )
    job.train = OneBatch(job.train, 2)
    at = train(Ranks(0, 1), tiny_decoder(), job)
    losses = [row["loss"] for row in at.history]
    assert losses[0] > 3 and losses[-1] < 0.05


@pytest.mark.parametrize(
    ("first", "last", "lowest", "told"),
    [
        (6.0, 5.9, 5.8, "it hardly moves"),
        (6.0, 2.0, 0.2, "it was at 0.200 and rose again: suspect rates that are too high"),
        (6.0, 1.0, 0.99, "it falls too slowly"),
    ],
)
def test_a_failure_says_what_to_suspect(first: float, last: float, lowest: float, told: str) -> None:
    found = Overfit(first, last, lowest, 300, 0.05, None, 1.0)
    with pytest.raises(CheckFailed, match=told):
        require_overfit(found)


def test_success_says_when() -> None:
    found = Overfit(6.0, 0.01, 0.009, 300, 0.05, 90, 1.0)
    require_overfit(found)
    assert found.sentence() == "one batch: loss 6.000 → 0.0100 in 300 steps (below 0.05 after 90)"
