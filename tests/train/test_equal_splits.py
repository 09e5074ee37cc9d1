"""One batch, split in many ways over micro-batches and ranks: the same step.

What may differ is the order in which numbers are added, so gradients are compared relative to the largest
one: 1e-12 in float64, 1e-5 in float32, 2e-2 in bfloat16 (8 bits). Two summands commute: bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import add_lora, make_job, stop_on_rank, tiny_decoder, tiny_loop, train_on_rank

from microlm.core.metrics import read_metrics
from microlm.core.recipe import Parallel
from microlm.model import directory
from microlm.train.ranks import Ranks, launch
from microlm.train.step import accumulate, make_forward

ROWS = 8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def gradients(
    folder: Path, dtype: torch.dtype, micro_rows: int, dropout: float = 0.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss and gradients of the first batch, `micro_rows` rows at a time.

    With `dropout`: those of an adapter.
    """
    decoder = tiny_decoder()
    if dropout:
        add_lora(decoder, dropout=dropout)
    with torch.no_grad():  # as after some training: the last matrices do not start from zero
        generator = torch.Generator().manual_seed(1)
        for p in decoder.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    if dtype == torch.float64:
        decoder.double()
    decoder.compute_dtype = dtype
    job = make_job(folder, tiny_loop(batch_rows=ROWS, micro_rows=micro_rows))
    batch = next(job.train.batches(ROWS))
    forward = make_forward(decoder, job.loop)
    torch.manual_seed(0)
    loss = accumulate(Ranks(0, 1), forward, decoder, batch, job, lambda: False)
    return float(loss), {n: p.grad.double() for n, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("micro_rows", [4, 3, 1])
def test_micro_batches_give_the_gradients_of_the_whole(
    tmp_path: Path, dtype: torch.dtype, micro_rows: int
) -> None:
    """(8 x 1) = (4 x 2) = (1 x 8), and 3 + 3 + 2 too: what is weighted are labels, not micro-batches."""
    whole, split = (gradients(tmp_path, dtype, size) for size in (ROWS, micro_rows))
    assert split[0] == pytest.approx(whole[0], rel=TOLERANCE[dtype])
    assert split[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert float((split[1][name] - gradient).abs().max()) <= TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("micro_rows", [4, 3, 1])
def test_dropout_is_the_same_in_any_micro_batch(tmp_path: Path, micro_rows: int) -> None:
    whole, split = (gradients(tmp_path, torch.float64, size, dropout=0.5) for size in (ROWS, micro_rows))
    assert split[0] == pytest.approx(whole[0], rel=1e-12)
    assert split[0] != pytest.approx(gradients(tmp_path, torch.float64, ROWS)[0], rel=1e-3)
    for name, gradient in whole[1].items():
        assert torch.allclose(split[1][name], gradient, rtol=1e-9, atol=1e-12), name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in directory.load(folder).named_parameters()}


@pytest.mark.slow
def test_one_two_and_four_ranks_make_the_same_steps(tmp_path: Path) -> None:
    """Eight rows a step whoever takes them: four micro-batches on 1, 2 and 4 ranks; two, bit for bit."""
    for micro_rows, sizes in ((2, (1, 2, 4)), (4, (1, 2))):
        loop = tiny_loop(6, batch_rows=ROWS, micro_rows=micro_rows, log_steps=1, tokens=6 * ROWS * 32)
        for size in sizes:
            parallel = Parallel(processes=size, threads=1)
            launch(parallel, train_on_rank, tmp_path / f"{micro_rows}-{size}", loop)
    alone = weights(tmp_path / "2-1")
    losses = [r["loss"] for r in read_metrics(tmp_path / "2-1/logs/metrics.jsonl") if "loss" in r]
    for size in (2, 4):
        together = weights(tmp_path / f"2-{size}")
        assert max(float((alone[n] - together[n]).abs().max()) for n in alone) <= 1e-5
        rows = read_metrics(tmp_path / f"2-{size}/logs/metrics.jsonl")
        assert [r["loss"] for r in rows if "loss" in r] == pytest.approx(losses, rel=1e-6)
    one, two = ((tmp_path / f"4-{n}/model.safetensors").read_bytes() for n in (1, 2))
    assert one == two


@pytest.mark.slow
def test_the_number_of_ranks_may_change_between_a_stop_and_the_next_start(tmp_path: Path) -> None:
    """Two ranks begin, one goes on, two end: a checkpoint holds everything whole, by parameter."""
    one, two = Parallel(processes=1, threads=1), Parallel(processes=2, threads=1)
    loop = tiny_loop(micro_rows=4, batch_rows=ROWS, tokens=6 * ROWS * 32, validation_rows=0)
    launch(one, train_on_rank, tmp_path / "whole", loop)
    for parallel, call, step in ((two, 4, 3), (one, 5, 5)):  # rank 0 has one call a step, or two
        with pytest.raises(KeyboardInterrupt):
            launch(parallel, stop_on_rank, tmp_path / "parts", loop, call)
        last = max((tmp_path / "parts/resume").glob("step-????????"))
        assert last.name == f"step-{step:08d}"
    launch(two, train_on_rank, tmp_path / "parts", loop)
    whole, parts = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "parts"))
    assert whole == parts
