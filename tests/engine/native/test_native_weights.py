"""Codes of matrices: how far they are from the weights, what they cost, and what stays."""

from __future__ import annotations

import pytest
import torch
from artifacts import random_decoder, tiny_config
from torch.nn import functional as F

from microlm.core.errors import UserError
from microlm.engine.native.weights import Quantization, QuantizedLinear, quantize, weight_bytes
from microlm.model.transformer import Linear


def linear(outputs: int, inputs: int, bias: bool = False) -> Linear:
    made = Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        made.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("inputs", [64, 192, 100])
@pytest.mark.parametrize(("kind", "steps"), [("int8", 254), ("int4", 15)])
def test_a_weight_is_half_a_step_away_at_most(kind: Quantization, steps: int, inputs: int) -> None:
    plain = linear(10, inputs)
    coded = QuantizedLinear(plain, kind)
    group = inputs if kind == "int8" else 64
    for start in range(0, inputs, group):
        weights = plain.weight[:, start : start + group]
        low, high = weights.amin(-1), weights.amax(-1)
        if kind == "int8":
            low, high = -weights.abs().amax(-1), weights.abs().amax(-1)
        elif start + group > inputs:  # filled up with zeros
            low, high = low.clamp(max=0), high.clamp(min=0)
        off = (coded.weight[:, start : start + group] - weights).abs().amax(-1)
        assert (off <= (high - low) / steps / 2 + 1e-6).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_product_is_that_of_the_coded_weights(kind: Quantization) -> None:
    plain = linear(10, 100, bias=True)
    coded = QuantizedLinear(plain, kind)
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    expected = F.linear(x, coded.weight, plain.bias)
    torch.testing.assert_close(coded(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(coded(x.bfloat16()).float(), expected, atol=0.1, rtol=0.05)


def test_a_matrix_of_zeros_stays_one() -> None:
    plain = Linear(64, 8, bias=False)
    torch.nn.init.zeros_(plain.weight)
    for kind in ("int8", "int4"):
        assert not QuantizedLinear(plain, kind).weight.any()


def test_every_matrix_is_replaced_and_a_tied_embedding_stays() -> None:
    decoder = random_decoder(
        tiny_config("qwen2", hidden_size=64, head_dim=16, intermediate_size=128, tie_word_embeddings=True)
    )
    embedding, before = decoder.model.embed_tokens.weight.clone(), weight_bytes(decoder)
    quantize(decoder, "int4")
    assert not [m for m in decoder.modules() if isinstance(m, Linear)]
    assert torch.equal(decoder.model.embed_tokens.weight, embedding)
    matrices = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, QuantizedLinear))
    assert weight_bytes(decoder) == sum(p.numel() * 4 for p in decoder.parameters()) + matrices * 5 // 8
    assert weight_bytes(decoder) < 0.5 * before


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="quantize: 'int3' is not one of int8, int4"):
        quantize(random_decoder(tiny_config()), "int3")  # type: ignore[arg-type]
