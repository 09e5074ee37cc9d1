"""Tuning on conversations of very different lengths and label counts: however a batch is cut, the same step.

Packed = one sample at a time; any split over micro-batches and ranks weighs labels alike. The mean of the
micro-batches' means, as trainers have taken it, is another gradient: that is shown, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training import CONTEXT, make_job, random_set, tiny_decoder, tiny_loop, train_sft_on_rank, uneven_set

from microlm.core.metrics import read_metrics
from microlm.core.recipe import Parallel
from microlm.model import directory
from microlm.model.transformer import Decoder
from microlm.train.batches import IGNORE, Batch, PackedRows
from microlm.train.ranks import Ranks, launch
from microlm.train.step import accumulate, losses, make_forward

ROWS = 8
Gradients = dict[str, torch.Tensor]


def noisy_decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    """As after some training: the last matrices do not start from zero."""
    decoder = tiny_decoder()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    decoder.to(dtype).compute_dtype = dtype
    return decoder


def taken(decoder: Decoder) -> Gradients:
    """The gradients, which are forgotten."""
    found = {n: p.grad.double() for n, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    return found


def distance(one: Gradients, other: Gradients) -> float:
    """The largest difference, relative to the largest entry of the parameter's gradient."""
    assert one.keys() == other.keys() and all(float(g.abs().max()) > 0 for g in one.values())
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max()) for n in one)


def mixed_rows(**fields: str) -> PackedRows:
    """Conversations and documents side by side."""
    sets = {"talk": uneven_set(), "documents": random_set("documents", 0)}
    return PackedRows(sets, {"talk": 0.7, "documents": 0.3}, CONTEXT, 0, **fields)  # type: ignore[arg-type]


def alone(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of each sample of a batch, as a row of its own."""
    for ids, labels, segments in zip(batch.input_ids, batch.labels, batch.segments, strict=True):
        for segment in range(int(segments.max()) + 1):
            yield ids[segments == segment][None], labels[segments == segment]


@pytest.mark.parametrize("too_long", ["drop", "split"])
def test_packed_equals_unpacked_in_loss_and_gradients(tmp_path: Path, too_long: str) -> None:
    decoder = noisy_decoder()
    job = make_job(tmp_path, tiny_loop(batch_rows=ROWS, micro_rows=4), train=mixed_rows(too_long=too_long))
    forward = make_forward(decoder, job.loop)
    for batch in islice(job.train.batches(ROWS), 2):
        packed = float(accumulate(Ranks(0, 1), forward, decoder, batch, job, lambda: False)[0])
        gradients, summed = taken(decoder), 0.0
        for ids, labels in alone(batch):
            if bool((labels != IGNORE).any()):
                loss = F.cross_entropy(decoder(ids)[0], labels, ignore_index=IGNORE, reduction="sum")
                (loss / batch.label_count).backward()
                summed += float(loss.detach())
        assert abs(packed - summed) / batch.label_count < 1e-5
        assert distance(taken(decoder), gradients) < 1e-5


def test_positions_and_mask_are_what_makes_packed_equal_unpacked(tmp_path: Path) -> None:
    """Without the mask a sample sees its neighbours, and its gradient is another one."""
    decoder = noisy_decoder()
    job = make_job(tmp_path, tiny_loop(batch_rows=ROWS, micro_rows=ROWS), train=mixed_rows())
    batch = next(job.train.batches(ROWS))
    found = []
    for document_mask in (True, False):
        forward = make_forward(decoder, job.loop.model_copy(update={"document_mask": document_mask}))
        accumulate(Ranks(0, 1), forward, decoder, batch, job, lambda: False)
        found.append(taken(decoder))
    assert distance(*found) > 1e-2


def split_step(folder: Path, micro_rows: int, dtype: torch.dtype) -> tuple[float, Gradients]:
    """Summed loss and gradients of the first batch of uneven conversations."""
    decoder = noisy_decoder(dtype)
    rows = PackedRows({"talk": uneven_set()}, {}, CONTEXT, 0)
    job = make_job(folder, tiny_loop(batch_rows=ROWS, micro_rows=micro_rows), train=rows)
    batch, forward = next(rows.batches(ROWS)), make_forward(decoder, job.loop)
    counts = [batch.rows(start, start + micro_rows).label_count for start in range(0, ROWS, micro_rows)]
    assert micro_rows == ROWS or max(counts) > 1.5 * min(counts), "the micro-batches must be uneven"
    loss = accumulate(Ranks(0, 1), forward, decoder, batch, job, lambda: False)
    return float(loss[0]), taken(decoder)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("micro_rows", [4, 3, 2, 1])
def test_uneven_conversations_give_the_gradients_of_the_whole(
    tmp_path: Path, dtype: torch.dtype, tolerance: float, micro_rows: int
) -> None:
    """(8 x 1) = (4 x 2) = (1 x 8)."""
    whole, split = (split_step(tmp_path, size, dtype) for size in (ROWS, micro_rows))
    assert split[0] == pytest.approx(whole[0], rel=tolerance)
    assert distance(whole[1], split[1]) < tolerance


def test_the_mean_of_means_would_be_another_gradient(tmp_path: Path) -> None:
    """Each micro-batch divided by its own labels: what `accumulate` must not do."""
    decoder = noisy_decoder()
    rows = PackedRows({"talk": uneven_set()}, {}, CONTEXT, 0)
    job = make_job(tmp_path, tiny_loop(batch_rows=ROWS, micro_rows=1), train=rows)
    batch, forward = next(rows.batches(ROWS)), make_forward(decoder, job.loop)
    total = float(accumulate(Ranks(0, 1), forward, decoder, batch, job, lambda: False)[0])
    weighted, means = taken(decoder), 0.0
    for row in range(ROWS):
        part = batch.rows(row, row + 1)
        loss = losses(forward, decoder, part, job.objective).total / part.label_count / ROWS
        loss.backward()
        means += float(loss.detach())
    assert distance(weighted, taken(decoder)) > 0.05
    assert abs(means - total / batch.label_count) > 1e-3


@pytest.mark.slow
def test_one_two_and_four_ranks_tune_alike(tmp_path: Path) -> None:
    loop = tiny_loop(6, batch_rows=ROWS, micro_rows=2, log_steps=1, tokens=6 * ROWS * CONTEXT)
    for size in (1, 2, 4):
        launch(Parallel(processes=size, threads=1), train_sft_on_rank, tmp_path / str(size), loop)
    losses_of, weights_of = [], []
    for size in (1, 2, 4):
        rows = read_metrics(tmp_path / f"{size}/logs/metrics.jsonl")
        losses_of.append([r["loss"] for r in rows if "loss" in r])
        saved = directory.load(tmp_path / str(size)).named_parameters()
        weights_of.append({name: p.detach() for name, p in saved})
    for together, losses_there in zip(weights_of[1:], losses_of[1:], strict=True):
        assert losses_there == pytest.approx(losses_of[0], rel=1e-6) and len(losses_there) == 6
        assert max(float((weights_of[0][n] - together[n]).abs().max()) for n in together) <= 1e-5


def test_the_realised_shares_are_those_that_were_asked_for() -> None:
    rows = mixed_rows(too_long="split")
    stream = rows.batches(ROWS)
    for _ in range(40):
        last = next(stream)
    shares = rows.realised(stream.state())
    assert shares == {"documents": pytest.approx(0.3, abs=0.01), "talk": pytest.approx(0.7, abs=0.01)}
    assert last.label_count > 0 and sum(shares.values()) == pytest.approx(1.0)
    resumed = rows.batches(ROWS, stream.state())
    assert rows.realised(resumed.state()) == shares
    filled = np.sum(stream.state()["taken"])
    assert filled + stream.state()["padding"] == 40 * ROWS * CONTEXT
