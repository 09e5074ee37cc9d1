"""A base held as int8: near the original, with the gradients of what it computes, a quarter the size."""

from __future__ import annotations

import pytest
import torch
from artifacts import random_decoder, tiny_config
from torch.nn import functional as F

from microlm.core.errors import UserError
from microlm.model import lora
from microlm.model.transformer import Decoder, Linear

IDS = torch.tensor([[5, 7, 2, 250, 0, 31, 99, 4]])
CONFIG = lora.LoraConfig(4, 8.0, ("q_proj", "down_proj"), base="int8")


def drawn(bias: bool = False) -> Linear:
    """A matrix of 24 rows of very different size, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    matrix = Linear(40, 24, bias=bias)
    with torch.no_grad():
        for p in matrix.parameters():
            p.normal_(generator=generator)
        matrix.weight.mul_(torch.logspace(-4, 1, 24)[:, None])
        matrix.weight[5] = 0
    return matrix


def widened(matrix: lora.Int8Linear) -> torch.Tensor:
    return matrix.weight.float() * matrix.scale[:, None]


def test_each_weight_is_within_half_a_step_of_its_row() -> None:
    matrix = drawn()
    held = lora.Int8Linear(matrix)
    steps = matrix.weight.detach().abs().amax(1, keepdim=True) / 127
    assert held.weight.dtype == torch.int8 and int(held.weight.abs().max()) == 127
    assert ((widened(held) - matrix.weight).abs() <= steps * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_product_with_the_widened_matrix(dtype: torch.dtype, bias: bool) -> None:
    held = lora.Int8Linear(drawn(bias))
    x = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = held(x)
    shift = held.bias.detach() if bias else None
    wanted = F.linear(x.float(), widened(held), shift)
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (2e-2, 0.2)
    assert y.dtype == dtype and torch.allclose(y.float(), wanted, rtol=rtol, atol=atol)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.allclose(dx.float(), dy.float() @ widened(held), rtol=rtol, atol=atol)


def test_no_wide_matrix_is_kept_for_the_backward_pass() -> None:
    held, kept = lora.Int8Linear(drawn()), []
    x = torch.randn(6, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        held(x)
    assert {t.data_ptr() for t in kept} == {held.weight.data_ptr(), held.scale.data_ptr()}


def int8_decoder() -> Decoder:
    decoder = random_decoder(tiny_config("qwen2", tie_word_embeddings=True))
    lora.apply(decoder, CONFIG, torch.Generator().manual_seed(3))
    return decoder


def test_every_matrix_of_the_blocks_is_held_so_and_nothing_else() -> None:
    decoder = int8_decoder()
    held = [m for m in decoder.modules() if isinstance(m, lora.Int8Linear)]
    assert len(held) == 7 * decoder.config.num_hidden_layers and len(lora.adapted(decoder)) == 4
    assert type(decoder.lm_head) is Linear and decoder.model.embed_tokens.weight.dtype == torch.float32
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert [n for n, p in decoder.named_parameters() if p.requires_grad] == [
        n for n, _ in decoder.named_parameters() if "lora_" in n
    ]
    base = random_decoder(tiny_config("qwen2", tie_word_embeddings=True))
    difference = (decoder(IDS) - base(IDS)).abs().max()
    assert 0 < float(difference) < 0.05 * float(base(IDS).abs().max())


def test_it_learns_and_is_not_merged() -> None:
    decoder = int8_decoder()
    before = {n: p.clone() for n, p in decoder.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(lora.adapter_parameters(decoder), lr=0.1)
    decoder(IDS).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in decoder.named_parameters() if n in before)
    assert all(m.lora_B.abs().max() > 0 for m in lora.adapted(decoder).values())
    with pytest.raises(UserError, match=r"the base is held as int8.*load the model anew"):
        lora.merge(decoder)
