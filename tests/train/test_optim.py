"""Optimizers and schedules against values that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from training import add_lora, make_job, tiny_decoder, tiny_loop

from microlm.model.transformer import Decoder
from microlm.train import optim
from microlm.train.loop import train
from microlm.train.optim import Muon, OptimRecipe, rate
from microlm.train.ranks import Ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8), (16, 32), (32, 128), (128, 128), (1, 5)])
def test_orthogonal_brings_singular_values_to_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    u, _, v = torch.linalg.svd(
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)), full_matrices=False
    )
    x = u @ torch.diag(torch.linspace(1.0, 0.05, shape[0])) @ v  # far below, 5 steps do not reach one
    y = optim._orthogonal(x.to(dtype))
    values = torch.linalg.svdvals(y.float())
    assert y.dtype == dtype
    assert float(values.min()) > 0.7
    assert float(values.max()) < 1.2
    likeness = nn.functional.cosine_similarity(y.float().flatten(1), (u @ v).flatten(1))
    assert float(likeness.min()) > 0.97


def test_orthogonal_of_nothing_is_nothing() -> None:
    assert float(optim._orthogonal(torch.zeros(1, 4, 8)).abs().max()) == 0.0


@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
def test_a_step_of_muon_moves_by_its_rate(shape: tuple[int, int]) -> None:
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([p], lr=0.1, momentum=0.9).step()
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    assert torch.allclose(torch.linalg.svdvals(p.detach()) / (0.1 * scale), torch.ones(6), atol=0.3)
    assert float((p.detach() * p.grad).sum()) < 0


def test_equal_shapes_step_as_they_would_alone() -> None:
    grads = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    together = [nn.Parameter(torch.zeros(8, 16)) for _ in grads]
    alone = [nn.Parameter(torch.zeros(8, 16)) for _ in grads]
    for p, q, g in zip(together, alone, grads, strict=True):
        p.grad, q.grad = g.clone(), g.clone()
        Muon([q], 0.1, 0.9).step()
    Muon(together, 0.1, 0.9).step()
    for p, q in zip(together, alone, strict=True):
        assert torch.allclose(p, q, atol=1e-3)


def values(recipe: OptimRecipe, steps: int) -> list[float]:
    return [round(rate(recipe, s, steps), 6) for s in range(steps)]


def test_schedules_by_hand() -> None:
    plain = {"warmup_steps": 0, "final_share": 0.1}
    assert values(OptimRecipe(schedule="constant", **plain), 3) == [1.0, 1.0, 1.0]
    assert values(OptimRecipe(schedule="linear", **plain), 4) == [1.0, 0.75, 0.5, 0.25]
    wsd = OptimRecipe(schedule="wsd", stable_share=0.5, **plain)
    assert values(wsd, 10) == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * s / 4)) for s in range(4)]
    assert values(OptimRecipe(schedule="cosine", **plain), 4) == pytest.approx(cosine, abs=1e-5)


def test_the_rate_never_falls_below_its_floor_and_warms_up() -> None:
    low = OptimRecipe(schedule="linear", warmup_steps=0, final_share=0.4)
    assert values(low, 5) == [1.0, 0.8, 0.6, 0.4, 0.4]
    assert values(OptimRecipe(schedule="constant", warmup_steps=4), 5) == [0.25, 0.5, 0.75, 1.0, 1.0]
    flat = OptimRecipe(schedule="wsd", stable_share=1.0, warmup_steps=1)
    assert values(flat, 6) == [1.0] * 6


def grouped(optimizers: list[torch.optim.Optimizer]) -> list[int]:
    return [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"kind": "qwen2"}, {"kind": "llama"}])
def test_every_parameter_is_in_exactly_one_group(fields: dict[str, object]) -> None:
    decoder = tiny_decoder(**fields)
    found = grouped(optim.make(decoder, OptimRecipe()))
    assert sorted(found) == sorted(id(p) for p in decoder.parameters())


def test_the_groups_have_their_rates() -> None:
    decoder = tiny_decoder()
    recipe = OptimRecipe(matrix_lr=1, embedding_lr=2, head_lr=3, adapter_lr=4)
    names = {id(p): n for n, p in decoder.named_parameters()}
    rates = {
        names[id(p)]: g["base_lr"]
        for o in optim.make(decoder, recipe)
        for g in o.param_groups
        for p in g["params"]
    }
    assert rates["model.embed_tokens.weight"] == 2
    assert rates["lm_head.weight"] == rates["model.norm.weight"] == 3
    assert rates["model.layers.0.self_attn.q_norm.weight"] == 3
    assert rates["model.layers.1.mlp.down_proj.weight"] == 1
    adapted = optim.make(add_lora(decoder), recipe)
    assert {g["base_lr"] for o in adapted for g in o.param_groups} == {4}


def test_lora_trains_its_matrices_and_nothing_else(tmp_path: object) -> None:
    decoder = add_lora(tiny_decoder())
    trained = {n for n, p in decoder.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    assert sorted(grouped(optim.make(decoder, OptimRecipe()))) == sorted(
        id(p) for n, p in decoder.named_parameters() if n in trained
    )


def moved(before: dict[str, torch.Tensor], decoder: Decoder) -> set[str]:
    return {n for n, p in decoder.named_parameters() if not torch.equal(p, before[n])}


def test_frozen_stays_frozen(tmp_path) -> None:  # type: ignore[no-untyped-def]
    decoder = tiny_decoder()
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    add_lora(decoder)
    before = {n: p.detach().clone() for n, p in decoder.named_parameters()}
    train(Ranks(0, 1), decoder, make_job(tmp_path, tiny_loop(steps=3)))
    assert moved(before, decoder) == {n for n in before if "lora_" in n}


def test_every_weight_moves_in_full_training(tmp_path) -> None:  # type: ignore[no-untyped-def]
    decoder = tiny_decoder()
    before = {n: p.detach().clone() for n, p in decoder.named_parameters()}
    train(Ranks(0, 1), decoder, make_job(tmp_path, tiny_loop(steps=3)))
    assert moved(before, decoder) == set(before)


def test_momentum_warms_up() -> None:
    optimizers = optim.make(tiny_decoder(), OptimRecipe())
    seen = []
    for step in (0, 30, 60, 600):
        optim.set_rates(optimizers, OptimRecipe(), step, 1000)
        seen.append(round(optimizers[0].param_groups[0]["momentum"], 3))
    assert seen == [0.85, 0.9, 0.95, 0.95]


def test_decay_is_for_matrices_and_tables_never_for_norms() -> None:
    decoder = tiny_decoder()
    names = {id(p): n for n, p in decoder.named_parameters()}
    optimizers = optim.make(decoder, OptimRecipe(matrix_decay=0.3, table_decay=0.2))
    for group in (g for o in optimizers for g in o.param_groups):
        for name in (names[id(p)] for p in group["params"]):
            table = name in ("model.embed_tokens.weight", "lm_head.weight")
            expected = 0.0 if "norm" in name else 0.2 if table else 0.3
            assert group["weight_decay"] == expected, name


def test_adamw_for_all_is_torchs_adamw() -> None:
    """One rate, the usual betas: three steps of ours are those of one plain optimizer."""
    rate = {"matrix_lr": 1e-2, "embedding_lr": 1e-2, "head_lr": 1e-2}
    recipe = OptimRecipe(matrices="adamw", adam_beta1=0.9, adam_beta2=0.99, adam_eps=1e-8, **rate)
    ours, theirs = tiny_decoder(), tiny_decoder()
    mine = optim.make(ours, recipe)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    assert [type(o) for o in mine] == [torch.optim.AdamW]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        mine[0].step()
        plain.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
