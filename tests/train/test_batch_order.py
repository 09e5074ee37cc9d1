"""The order of the data depends on the seed and the row's number; any place can be entered at once."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import CONTEXT, make_job, random_set, tiny_decoder, tiny_loop, token_set

from microlm.text.shards import TokenSet
from microlm.train import objectives
from microlm.train.batches import Batch, PackedRows
from microlm.train.batches.order import Order
from microlm.train.ranks import Ranks
from microlm.train.step import accumulate, make_forward


def mixed(seed: int = 3, **fields: Any) -> PackedRows:
    sets = {
        "documents": random_set("documents", 0),
        "question": random_set("question", 1, 80, conversations=True),
        "talk": random_set("talk", 2, 50, conversations=True),
    }
    return PackedRows(sets, {"documents": 0.5, "question": 0.2, "talk": 0.3}, CONTEXT, seed, **fields)


def same(a: Batch, b: Batch) -> bool:
    tensors = ((getattr(x, n) for n in ("input_ids", "labels", "segments")) for x in (a, b))
    return a.samples == b.samples and all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 65_537])
def test_an_order_is_a_permutation_that_can_be_entered_anywhere(count: int) -> None:
    order = Order(count, seed=7)
    whole = order.take(0, count + 10).tolist()
    assert sorted(whole) == list(range(count))
    middle = count // 3
    assert order.take(middle, middle + 50).tolist() == whole[middle : middle + 50]
    if count > 16:
        assert whole != Order(count, seed=8).take(0, count).tolist()
        assert abs(np.corrcoef(whole, range(count))[0, 1]) < 4 / count**0.5


def test_all_orders_of_three_are_about_as_likely() -> None:
    seen = Counter(tuple(Order(3, seed).take(0, 3).tolist()) for seed in range(1200))
    assert len(seen) == 6
    assert 140 < min(seen.values()) <= max(seen.values()) < 260  # 200 expected, five sigma


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_batches(workers: int, document_mask: bool) -> None:
    rows = mixed(document_mask=document_mask)
    alone = list(islice(rows.batches(4), 50))
    with rows.batches(4, workers=workers) as stream:
        assert all(same(next(stream), expected) for expected in alone)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("taken", [0, 1, 7, 39])
def test_a_stream_goes_on_where_its_state_says(workers: int, taken: int) -> None:
    whole = list(islice(mixed().batches(4), 60))
    with mixed().batches(4, workers=workers) as stream:
        for _ in range(taken):
            next(stream)
        state = json.loads(json.dumps(stream.state()))
    with mixed().batches(4, state, workers) as later:
        assert all(same(next(later), expected) for expected in whole[taken:])
        for expected in islice(mixed().batches(4, later.state()), 3):
            assert same(next(later), expected)


def test_the_size_of_a_batch_does_not_change_the_rows() -> None:
    large, small = next(mixed().batches(24)), list(islice(mixed().batches(1), 24))
    assert torch.equal(large.input_ids, torch.cat([b.input_ids for b in small]))
    assert large.samples == tuple(b.samples[0] for b in small)
    assert not torch.equal(large.input_ids, next(mixed(seed=4).batches(24)).input_ids)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_share_the_same_global_batch(tmp_path: Path, size: int) -> None:
    seen: list[Batch] = []

    def remember(hidden: torch.Tensor, decoder: Any, batch: Batch) -> torch.Tensor:
        seen.append(batch)
        return objectives.next_token(hidden, decoder, batch)

    loop = tiny_loop(batch_rows=8)
    job = make_job(tmp_path, loop, objective=remember, train=mixed())
    decoder = tiny_decoder()
    for rank in range(size):
        batch = next(job.train.batches(loop.batch_rows, workers=rank % 2))
        accumulate(Ranks(rank, size), make_forward(decoder, loop), decoder, batch, job, lambda: False)
    expected = next(mixed().batches(loop.batch_rows))
    assert Counter(row for b in seen for row in b.samples) == Counter(expected.samples)
    assert sum(b.label_count for b in seen) == expected.label_count


def test_every_sample_once_an_epoch_in_a_new_order() -> None:
    samples = [[i + 1] * (CONTEXT + 1) for i in range(50)]
    rows = PackedRows({"documents": token_set("documents", samples)}, {}, CONTEXT, 7)
    first, second = (b.input_ids[:, 0].tolist() for b in islice(rows.batches(50), 2))
    assert sorted(first) == sorted(second) == list(range(1, 51))
    assert first != second


def test_epochs_are_counted() -> None:
    samples = [[i + 1] * (CONTEXT + 1) for i in range(50)]
    rows = PackedRows({"documents": token_set("documents", samples)}, {}, CONTEXT, 7)
    stream = rows.batches(25)
    assert rows.epochs(stream.state()) == {"documents": 0.02}  # one sample is held ready
    for _ in range(3):
        next(stream)
    assert rows.epochs(stream.state()) == {"documents": 1.52}


def test_a_far_place_is_entered_without_walking_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million samples: the state after 999,000 of them costs the reading of two blocks, not of them all."""
    count = 1_000_000
    tokens = TokenSet(
        "documents", np.arange(3 * count, dtype="<u4"), None, np.arange(3, 3 * count + 1, 3, dtype=np.int64)
    )
    rows = PackedRows({"documents": tokens}, {}, CONTEXT, 0)
    state = rows.batches(1).state() | {"places": [[0, 999_000]], "held": []}
    asked: list[int] = []
    take = Order.take

    def counted(self: Order, start: int, stop: int) -> Any:
        asked.append(stop - start)
        return take(self, start, stop)

    monkeypatch.setattr(Order, "take", counted)
    batch = next(rows.batches(8, state))
    assert sum(asked) <= 512
    order = Order(count, rows_seed(rows))
    expected = order.take(999_000, 999_000 + 8 * CONTEXT // 2).tolist()
    assert [n for row in batch.samples for _, n in row] == expected


def rows_seed(rows: PackedRows) -> int:
    from microlm.core import runtime

    return runtime.derive_seed(rows.seed, "order", "documents", 0)


def test_mapped_files_are_not_copied(tmp_path: Path) -> None:
    np.arange(1, 4001, dtype="<u2").tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype="<u2", mode="r")
    rows = PackedRows(
        {"documents": TokenSet("documents", mapped, None, np.array([1000, 4000]))}, {}, CONTEXT, 0
    )
    assert np.shares_memory(rows._tokens[0], mapped)
    assert sorted(next(rows.batches(124)).input_ids.flatten().unique().tolist())[-1] <= 4000


def test_an_error_of_a_worker_reaches_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = mixed()
    assemble = PackedRows.assemble
    calls = [0]

    def broken(self: PackedRows, pieces: Sequence[Any]) -> Batch:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError("the disk is gone")
        return assemble(self, pieces)

    monkeypatch.setattr(PackedRows, "assemble", broken)
    with rows.batches(2, workers=1) as stream:
        assert next(stream).input_ids.shape == next(stream).input_ids.shape == (2, CONTEXT)
        with pytest.raises(OSError, match="the disk is gone"):
            next(stream)


def test_a_closed_stream_leaves_no_thread() -> None:
    before = threading.active_count()
    with mixed().batches(2, workers=4) as stream:
        next(stream)
        assert threading.active_count() == before + 4
    assert threading.active_count() == before


@pytest.mark.gpu
def test_batches_come_pinned_and_reach_the_gpu_unchanged() -> None:
    expected = list(islice(mixed().batches(4), 5))
    with mixed().batches(4, workers=2) as stream:
        for batch in expected:
            found = next(stream)
            assert found.input_ids.is_pinned()
            moved = found.to(torch.device("cuda", 0))
            assert moved.labels.device.type == "cuda"
            assert moved.label_count == batch.label_count
            assert same(moved.to(torch.device("cpu")), batch)
            assert torch.equal(moved.positions.cpu(), batch.positions)
