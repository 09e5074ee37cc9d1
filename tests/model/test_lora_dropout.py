"""Dropout is a fixed function of seed, row, position, matrix and element; elsewhere there is none."""

from __future__ import annotations

import pytest
import torch
from artifacts import random_decoder, tiny_config
from torch.nn import functional as F

from microlm.model import lora
from microlm.model.lora.dropout import dropped, dropped_product, matrix_keys, row_keys
from microlm.model.transformer import Decoder

HERE = torch.device("cpu")
IDS = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(0))
RATE = 0.25


def adapted(rate: float = RATE) -> Decoder:
    """A random decoder with an adapter that matters."""
    decoder, generator = random_decoder(tiny_config()), torch.Generator().manual_seed(1)
    lora.apply(decoder, lora.LoraConfig(4, 8.0, dropout=rate), generator)
    with torch.no_grad():
        for module in lora.adapted(decoder).values():
            module.lora_B.normal_(0, 0.1, generator=generator)
    return decoder


def masks(seed: int, number: int, first: int = 0) -> torch.Tensor:
    """What is kept of 8 rows of 32 positions of 64 elements."""
    keys = matrix_keys(row_keys(seed, first, 8, 32, HERE), number)
    return dropped(torch.ones(8, 32, 64), keys, RATE)


def test_the_share_is_dropped_and_the_rest_is_scaled() -> None:
    kept = masks(0, 0)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((kept == 0).float().mean()) == pytest.approx(RATE, abs=0.015)  # 4 sigma of 16,384 draws
    for dim in (0, 1, 2):
        shares = (kept == 0).float().mean(dim=tuple({0, 1, 2} - {dim}))
        sigma = (RATE * (1 - RATE) * kept.shape[dim] / kept.numel()) ** 0.5
        assert float((shares - RATE).abs().max()) < 5 * sigma


def test_every_row_step_and_matrix_has_a_draw_of_its_own() -> None:
    draws = [masks(0, 0), masks(1, 0), masks(0, 1), masks(0, 0, first=8), masks(0, 0).roll(1, 1)]
    flat = torch.stack([(d == 0).float().flatten() for d in draws])
    assert float((torch.corrcoef(flat) - torch.eye(len(draws))).abs().max()) < 0.04
    assert torch.equal(masks(0, 0)[3:5], masks(0, 0, first=3)[:2])


def test_gradients_are_those_of_the_mask() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    a = torch.randn(3, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    keys = row_keys(7, 0, 2, 5, HERE)
    ours, plain = dropped_product(x, a, keys, RATE), F.linear(dropped(x, keys, RATE), a)
    assert torch.equal(ours, plain)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), (x, a)),
        torch.autograd.grad((plain * weight).sum(), (x, a)),
        strict=True,
    ):
        assert torch.allclose(mine, other, rtol=1e-12)


def test_it_is_the_dropout_of_the_paper() -> None:
    """`base(x) + scale · B A dropped(x)` in every adapted matrix, whose input alone is touched."""
    module = next(iter(lora.adapted(adapted()).values()))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    module.keys = row_keys(7, 0, 2, 5, HERE)
    wanted = module.base(x) + 2.0 * (dropped(x, module.keys, RATE) @ module.lora_A.mT @ module.lora_B.mT)
    assert torch.allclose(module(x), wanted, atol=1e-5)


def test_nothing_is_dropped_outside_of_a_step() -> None:
    plain, decoder = adapted(0.0), adapted()
    with lora.dropping(decoder, 5, 0, IDS.shape):
        inside = decoder(IDS)
    assert torch.equal(decoder(IDS), plain(IDS)) and not torch.allclose(inside, plain(IDS), atol=1e-2)
    with lora.dropping(plain, 5, 0, IDS.shape):
        assert torch.equal(plain(IDS), decoder(IDS))
    with pytest.raises(RuntimeError), lora.dropping(decoder, 5, 0, IDS.shape):
        raise RuntimeError
    assert torch.equal(decoder(IDS), plain(IDS))


def test_rows_drop_the_same_in_any_company() -> None:
    decoder = adapted()
    with lora.dropping(decoder, 5, 0, IDS.shape):
        whole = decoder(IDS)
    parts = []
    for start in (0, 1, 3):
        part = IDS[start : {0: 1, 1: 3, 3: 4}[start]]
        with lora.dropping(decoder, 5, start, part.shape):
            parts.append(decoder(part))
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4)


def test_the_seed_comes_from_torch_s_generator() -> None:
    decoder, plain = adapted(), adapted(0.0)
    torch.manual_seed(0)
    first, second = lora.draw_seed(decoder), lora.draw_seed(decoder)
    torch.manual_seed(0)
    assert first != second and lora.draw_seed(decoder) == first
    state = torch.get_rng_state()
    assert lora.draw_seed(plain) == 0 and torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_the_compiler_drops_the_same() -> None:
    compiled = torch.compile(dropped, dynamic=False)
    x = torch.randn(3, 16, 96, generator=torch.Generator().manual_seed(4))
    keys = matrix_keys(row_keys(9, 2, 3, 16, HERE), 3)
    assert torch.equal(compiled(x, keys, RATE), dropped(x, keys, RATE))
