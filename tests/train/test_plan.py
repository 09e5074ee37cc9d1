"""The plan's figures = those of the real decoder, data and clock; what cannot fit is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from training import tiny_decoder

from microlm.core.errors import UserError
from microlm.core.recipe import build
from microlm.model import lora
from microlm.model.architecture import ArchitectureRecipe
from microlm.model.transformer import Block, Decoder, masked_attention
from microlm.train import memory, optim
from microlm.train.job import LoopRecipe
from microlm.train.plan import Plan, plan
from microlm.train.pretrain import PretrainRecipe
from microlm.train.reporter.speed import position_flops
from microlm.train.tuning.distil import DistilRecipe
from microlm.train.tuning.dpo import DpoRecipe
from microlm.train.tuning.sft import SftRecipe

INDEX: dict[str, Any] = {
    "vocab_size": 6400, "eos_token_id": 2, "pad_token_id": 0,
    "sets": {
        "documents-train": {"samples": 1000, "tokens": 500_000, "labels": 500_000},
        "documents-validation": {"samples": 10, "tokens": 5_000, "labels": 5_000},
        "conversations-chat-train": {"samples": 100, "tokens": 40_000, "labels": 10_000},
        "conversations-question-train": {"samples": 100, "tokens": 10_000, "labels": 5_000},
        "preferences-chat-train": {"samples": 200, "tokens": 30_000, "labels": 6_000},
    },
}  # fmt: skip
LOOP = {
    "tokens": 1_000_000,
    "context": 256,
    "batch_rows": 16,
    "micro_rows": 4,
    "dtype": "float32",
    "compile": False,
}


def recipe(loop: dict[str, Any] | None = None, **fields: Any) -> PretrainRecipe:
    values = {"out": "x", "shards": "y", "parallel": {"processes": 1}, "architecture": {"preset": "4m"}}
    return build(PretrainRecipe, values | {"loop": LOOP | (loop or {})} | fields, "pretrain")


def planned(loop: dict[str, Any] | None = None, **fields: Any) -> Plan:
    made = recipe(loop, **fields)
    assert made.architecture
    return plan(made, made.architecture.config(INDEX), INDEX, peak=False)


def tuning(**fields: Any) -> Plan:
    values = {"out": "x", "shards": "y", "model": "z", "loop": LOOP, "parallel": {"processes": 1}}
    config = ArchitectureRecipe(preset="4m").config(INDEX)
    return plan(build(SftRecipe, values | fields, "sft"), config, INDEX, peak=False)


def preferring(**fields: Any) -> Plan:
    values = {"out": "x", "shards": "y", "model": "z", "loop": LOOP, "parallel": {"processes": 1}}
    config = ArchitectureRecipe(preset="4m").config(INDEX)
    return plan(build(DpoRecipe, values | fields, "dpo"), config, INDEX, peak=False)


def test_pairs_are_planned_like_conversations() -> None:
    """The head runs where answers are; SFT without a mixture reads no preferences."""
    found = preferring()
    assert found.epochs == {"chat": pytest.approx(found.tokens / 30_000)}
    config = ArchitectureRecipe(preset="4m").config(INDEX)
    body, head = position_flops(memory.shadow(config, LoopRecipe(**LOOP)), 256)
    assert found.flops_per_token == pytest.approx(body + 0.2 * head)
    assert set(tuning().epochs) == {"chat", "question"}
    assert found.trained > preferring(lora={"rank": 2}).trained > 0


def test_a_teacher_takes_memory_and_a_third_of_its_own_step() -> None:
    values = {"out": "x", "shards": "y", "teacher": "t", "loop": LOOP, "parallel": {"processes": 1}}
    made = build(DistilRecipe, values | {"architecture": {"preset": "4m"}}, "distil")
    student, teacher = (ArchitectureRecipe(preset=p).config(INDEX) for p in ("4m", "26m"))
    alone, taught = (plan(made, student, INDEX, teacher=t, peak=False) for t in (None, teacher))
    assert alone.epochs == taught.epochs == {"documents": pytest.approx(alone.tokens / 500_000)}
    weights = 4 * teacher.parameters
    assert weights < taught.memory.teacher < 3 * weights and alone.memory.teacher == 0
    assert taught.memory.total - alone.memory.total == pytest.approx(taught.memory.teacher * 1.35, rel=1e-3)
    body, head = position_flops(memory.shadow(teacher, made.loop), 256)
    assert taught.flops_per_token - alone.flops_per_token == pytest.approx((body + head) / 3)
    with pytest.raises(UserError, match=r"training needs about .* GiB, 0\.\d GiB are free"):
        memory.require_fit(taught.memory, made.loop, 1, room=int(0.7 * alone.memory.total))


def test_weights_steps_and_epochs() -> None:
    found = planned()
    assert sum(found.parameters.values()) == found.trained == 4_032_448
    assert (found.steps, found.batch_tokens, found.tokens) == (244, 4096, 244 * 4096)
    assert found.epochs == {"documents": pytest.approx(244 * 4096 / 500_000)}
    assert planned({"tokens": 2_000_000}).epochs["documents"] == pytest.approx(488 * 4096 / 500_000)


def test_arithmetic_is_that_of_the_reporter() -> None:
    """And that is about six for each weight that multiplies, with the attention on top."""
    with torch.device("meta"):
        decoder = Decoder(ArchitectureRecipe(preset="4m").config(INDEX))
    body, head = position_flops(decoder, 256)
    found = planned()
    assert found.flops_per_token == body + head
    multiplied = 4_032_448 - 6400 * 192 - 2_000
    assert found.flops_per_token == pytest.approx(6 * multiplied + 12 * 4 * 192 * 256, rel=0.01)
    assert found.flops == found.tokens * found.flops_per_token


def test_a_mixture_is_read_by_its_shares() -> None:
    found = tuning(mixture={"chat": 0.75, "documents": 0.25})
    assert set(found.epochs) == {"chat", "documents"}
    assert found.epochs["chat"] == pytest.approx(found.tokens * 0.75 / 40_000)
    assert set(tuning().epochs) == {"chat", "question"}
    body, head = (tuning().flops_per_token - planned().flops_per_token, 6 * 6400 * 192)
    assert body == pytest.approx(head * (15 / 50 - 1))  # the head runs where there are labels


def test_an_adapter_trains_few_weights_and_needs_few_moments() -> None:
    full, small = tuning(), tuning(lora={"rank": 8})
    decoder = Decoder(ArchitectureRecipe(preset="4m").config(INDEX))
    decoder.weights_from = "a test"
    lora.apply(decoder, lora.LoraConfig(8, 32.0), None)
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    assert small.trained == small.parameters["adapter"] == trained
    assert small.memory.moments == 8 * trained
    assert small.memory.gradients < full.memory.gradients / 10
    assert small.flops_per_token < full.flops_per_token


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_what_a_block_keeps_is_counted_without_computing_it(kind: str, dtype: str) -> None:
    config = ArchitectureRecipe(preset="4m", model_type=kind).config(INDEX)
    loop = LoopRecipe(context=64, micro_rows=3, dtype=dtype, compile=False)
    kind_of = loop.compute_dtype()
    block, kept = Block(config), {}
    x = torch.randn(3, 64, config.hidden_size, dtype=kind_of, requires_grad=True)
    angles = torch.zeros(3, 1, 64, config.head_dim, dtype=kind_of)
    mask = torch.zeros(3, 1, 64, 64, dtype=kind_of)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x, (angles, angles), 0, lambda layer, q, k, v: masked_attention(q, k, v, mask))
    for tensor in (*block.parameters(), angles, mask):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert memory.block_bytes(config, loop, 3) == sum(kept.values())


def test_moments_are_those_that_the_optimizers_make() -> None:
    decoder = tiny_decoder()
    optimizers = optim.make(decoder, optim.OptimRecipe())
    for p in decoder.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    states = [t for o in optimizers for s in o.state.values() for t in s.values() if t.dim()]
    found = memory.predict(decoder, LoopRecipe(), optim.OptimRecipe(), ranks=1)
    assert found.moments == sum(t.nbytes for t in states)
    assert found.weights == found.gradients == sum(p.nbytes for p in decoder.parameters())


def test_memory_grows_with_what_needs_it() -> None:
    one = planned().memory
    assert planned({"micro_rows": 8}).memory.activations == pytest.approx(2 * one.activations, rel=0.05)
    assert one.logits < planned({"micro_rows": 8}).memory.logits < 2 * one.logits  # a chunk at a time
    assert planned({"activation_checkpointing": True}).memory.activations < 0.5 * one.activations
    assert planned(architecture={"preset": "26m"}).memory.weights == 4 * 25_829_888
    several = planned(parallel={"processes": 4}).memory
    assert (one.sums, several.sums) == (0, one.gradients)
    assert planned({"checkpoint_steps": 1000}).memory.snapshot == 0 < one.snapshot
    assert planned({"dtype": "bfloat16"}).memory.activations < 0.7 * one.activations
    assert dataclasses.replace(one, scratch=10 * one.activations).total > one.total


def test_a_shadow_takes_no_memory() -> None:
    """Eight billion weights, of which this machine could not hold the gradients."""
    wide = {"hidden_size": 4096, "layers": 32, "heads": 32, "intermediate_size": 14_336}
    found = planned(architecture=wide)
    assert found.trained > 7e9
    assert found.memory.total > 100e9
    with pytest.raises(UserError, match=r"needs about \d+\.\d GiB, .* GiB are free; choose a smaller"):
        memory.require_fit(found.memory, recipe().loop, 1, room=20 << 30)


def test_what_cannot_fit_says_what_to_lower() -> None:
    loop = recipe({"micro_rows": 64, "batch_rows": 64, "context": 2048, "dtype": "float32"}).loop
    found = planned({"micro_rows": 64, "batch_rows": 64, "context": 2048}).memory
    memory.require_fit(found, loop, 1, room=found.total)
    with pytest.raises(UserError, match=r"lower loop\.micro_rows from 64 to (\d+)") as told:
        memory.require_fit(found, loop, 1, room=4 << 30)
    rows = int(str(told.value).rsplit(" ", 1)[1])
    fitting = planned({"micro_rows": rows, "batch_rows": 64, "context": 2048}).memory
    more = planned({"micro_rows": 2 * rows, "batch_rows": 64, "context": 2048}).memory
    assert fitting.total <= 4 << 30 < more.total
    small = planned().memory
    memory.require_fit(small, recipe().loop, 2, room=2 * small.total)
    with pytest.raises(UserError, match=r"in each of 8 processes, .*; lower parallel\.processes"):
        memory.require_fit(small, recipe({"micro_rows": 1}).loop, 8, room=2 * small.total)


def test_there_is_memory_here() -> None:
    assert 1 << 20 < memory.available() < 1 << 50


def test_the_plan_in_words_and_as_json() -> None:
    made = recipe()
    assert made.architecture
    found = plan(made, made.architecture.config(INDEX), INDEX)
    assert found.peak_flops and found.peak_flops > 1e9
    assert found.seconds_at_peak == pytest.approx(found.flops / found.peak_flops)
    told = "\n".join(found.lines())
    assert "parameters  4,032,448: embedding 1,228,800" in told
    assert "epochs: documents 2.00" in told
    assert "GFLOP/s; --measure" in told
    timed = dataclasses.replace(found, tokens_per_s=1000.0)
    assert timed.seconds == found.tokens / 1000
    assert "16 min 39 s at 1,000 tokens/s" in "\n".join(timed.lines())
    data = json.loads(json.dumps(found.to_json()))
    assert (data["parameters_total"], data["memory"]["total"]) == (4_032_448, found.memory.total)
    assert (data["seconds"], data["tokens_per_s"]) == (None, None)
    assert data["seconds_at_peak"] == found.seconds_at_peak


def test_without_shards_the_epochs_are_unknown() -> None:
    made = recipe()
    assert made.architecture
    found = plan(made, made.architecture.config(INDEX), INDEX | {"sets": {}}, peak=False)
    assert found.epochs == {}
    assert found.flops_per_token == planned().flops_per_token
    assert "epochs: unknown" in "\n".join(found.lines())
