"""The forms of a step give the same gradients: masks or none, recomputed or kept, compiled or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import CONTEXT, make_job, random_set, tiny_decoder, tiny_loop

from microlm.model.transformer import Decoder
from microlm.train import objectives
from microlm.train.batches import Batch, PackedRows, document_mask
from microlm.train.job import LoopRecipe
from microlm.train.ranks import Ranks
from microlm.train.step import accumulate, losses, make_forward

PLAIN = objectives.plain(objectives.next_token)


def noisy_decoder(**fields: Any) -> Decoder:
    """As after some training: no matrix is zero."""
    decoder = tiny_decoder(**fields)
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return decoder


def rows(count: int, masked: bool) -> Batch:
    sets = {"documents": random_set("documents", 0)}
    return next(PackedRows(sets, {}, CONTEXT, 0, document_mask=masked).batches(count))


def gradients(decoder: Decoder, loop: LoopRecipe, batch: Batch) -> dict[str, Tensor]:
    decoder.zero_grad()
    losses(make_forward(decoder, loop), decoder, batch, PLAIN).total.backward()
    return {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}


def require_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = float(expected.abs().max())
        assert scale > 0, name
        assert float((ours[name] - expected).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("masked", [True, False])
def test_recomputed_blocks_give_the_same_gradients(kind: str, masked: bool) -> None:
    """Bit for bit: the same kernels see the same numbers again."""
    decoder, batch = noisy_decoder(kind=kind), rows(3, masked)
    kept = gradients(decoder, tiny_loop(document_mask=masked), batch)
    again = gradients(decoder, tiny_loop(document_mask=masked, activation_checkpointing=True), batch)
    assert kept.keys() == again.keys() == dict(decoder.named_parameters()).keys()
    assert all(torch.equal(kept[n], again[n]) for n in kept)


def test_recomputed_blocks_keep_less() -> None:
    """Bytes that autograd holds after a forward pass."""
    decoder, batch = noisy_decoder(), rows(4, True)

    def held(loop: LoopRecipe) -> int:
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            losses(make_forward(decoder, loop), decoder, batch, PLAIN)
        for p in decoder.parameters():
            found.pop(p.untyped_storage().data_ptr(), None)
        return sum(found.values())

    assert held(tiny_loop(activation_checkpointing=True)) < 0.5 * held(tiny_loop())


def test_without_documents_no_mask_is_a_causal_mask() -> None:
    """Padding is at the end of a row, where nobody looks."""
    decoder, batch = noisy_decoder(), rows(3, masked=False)
    forward = make_forward(decoder, tiny_loop(document_mask=False))
    assert forward.seen(batch) is None
    causal = gradients(decoder, tiny_loop(document_mask=False), batch)
    assert document_mask(batch.segments, torch.float32).shape == (3, 1, CONTEXT, CONTEXT)
    require_close(causal, gradients(decoder, tiny_loop(document_mask=True), batch), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
def test_a_compiled_step_is_the_eager_one(masked: bool, recomputed: bool) -> None:
    decoder, batch = noisy_decoder(), rows(3, masked)
    eager = gradients(decoder, tiny_loop(document_mask=masked), batch)
    loop = tiny_loop(document_mask=masked, compile=True, activation_checkpointing=recomputed)
    require_close(gradients(decoder, loop, batch), eager, 1e-4)


def test_a_stop_is_heard_within_a_micro_batch(tmp_path: Path) -> None:
    """Between blocks, forward and backward: what is under way is given up."""
    decoder = noisy_decoder(num_hidden_layers=6)
    job = make_job(tmp_path, tiny_loop(batch_rows=2, micro_rows=2))
    batch = next(job.train.batches(2))
    forward = make_forward(decoder, job.loop)
    asked = 0

    def stopped_after(count: int) -> int:
        nonlocal asked
        asked = 0

        def stopped() -> bool:
            nonlocal asked
            asked += 1
            return asked > count

        accumulate(Ranks(0, 1), forward, decoder, batch, job, stopped)
        return asked

    whole = stopped_after(1000)
    assert whole >= 12
    for count in range(whole):
        assert stopped_after(count) == count + 1  # nothing more is asked, nothing more is done


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_step_on_the_gpu_is_the_one_on_the_cpu(masked: bool, compiled: bool) -> None:
    """bf16 there, float32 here: gradients within bf16's 8 bits, summed."""
    decoder, batch = noisy_decoder(head_dim=32), rows(3, masked)
    here = gradients(decoder, tiny_loop(document_mask=masked), batch)
    decoder.compute_dtype = torch.bfloat16
    decoder.to("cuda")
    loop = tiny_loop(document_mask=masked, dtype="bfloat16", compile=compiled)
    there = gradients(decoder, loop, batch.pinned())
    require_close({n: g.cpu() for n, g in there.items()}, here, 5e-2)
