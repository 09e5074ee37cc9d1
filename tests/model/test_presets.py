"""The presets' exact counts, their logits = transformers', the size dial, contradictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import random_decoder
from transformers import AutoModelForCausalLM

from microlm.core.errors import UserError
from microlm.core.recipe import build
from microlm.model import directory
from microlm.model.architecture import ArchitectureRecipe
from microlm.model.presets import PRESETS, VOCABULARY, PresetName, shape_of_size
from microlm.model.transformer import Decoder

INDEX = {"vocab_size": VOCABULARY, "eos_token_id": 2, "pad_token_id": 0}
COUNTS: dict[PresetName, int] = {
    "4m": 4_032_448, "26m": 25_829_888, "31m": 31_465_984, "64m": 63_912_192, "110m": 110_324_480,
}  # fmt: skip


def architecture(**fields: Any) -> ArchitectureRecipe:
    return build(ArchitectureRecipe, fields, "architecture")


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_a_preset_has_exactly_so_many_weights(name: PresetName, count: int) -> None:
    config = architecture(preset=name).config(INDEX)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(p.numel() for p in decoder.parameters()) == config.parameters == count
    assert PRESETS[name].parameters(VOCABULARY) == count


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_are_those_of_the_decoder(kind: str, tied: bool) -> None:
    config = architecture(preset="4m", model_type=kind, tied=tied, layers=3).config(INDEX)
    with torch.device("meta"):
        named = dict(Decoder(config).named_parameters())
    found = dict.fromkeys(config.parameter_parts(), 0)
    for name, weight in named.items():
        part = next(
            p for p, words in {"norms": "norm", "embedding": "embed", "head": "lm_head", "mlp": "mlp",
                               "attention": "self_attn"}.items() if words in name
        )  # fmt: skip
        found[part] += weight.numel()
    assert found == config.parameter_parts()


@pytest.mark.parametrize("name", COUNTS)
def test_a_presets_logits_are_those_of_transformers(tmp_path: Path, name: PresetName) -> None:
    """Weights of the usual size, so that the largest difference means what it does for a trained model."""
    decoder = random_decoder(architecture(preset=name).config(INDEX))
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(5 * weight.shape[1] ** -0.5 if weight.dim() == 2 else 1)
    directory.save(decoder, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, VOCABULARY, (1, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = decoder(ids), theirs(ids).logits
    assert expected.std() > 0.5
    assert (ours - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("vocabulary", [2432, 6400, 32_000])
@pytest.mark.parametrize("size", ["4m", "10m", "26m", "40m", "64m", "110m", "0.5b"])
def test_the_dial_meets_the_size_in_good_proportions(size: str, vocabulary: int) -> None:
    recipe = architecture(size=size)
    config = recipe.config(INDEX | {"vocab_size": vocabulary})
    assert recipe.size is not None
    assert abs(config.parameters / recipe.size - 1) <= 0.03
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    assert 1.9 < config.intermediate_size / config.hidden_size < 3.4
    assert 10 < config.hidden_size / config.num_hidden_layers < 110
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(config).parameters()) == config.parameters


def test_the_dial_keeps_what_is_stated() -> None:
    stated = {"layers": 12, "model_type": "llama", "kv_heads": 1, "tied": True, "max_positions": 640}
    config = architecture(size="40m", **stated).config(INDEX)
    assert abs(config.parameters / 40e6 - 1) <= 0.03
    assert (config.num_hidden_layers, config.num_key_value_heads, config.model_type) == (12, 1, "llama")
    assert (config.tie_word_embeddings, config.max_position_embeddings) == (True, 640)
    wide = architecture(size="40m", hidden_size=512).config(INDEX)
    assert (wide.hidden_size, abs(wide.parameters / 40e6 - 1) <= 0.03) == (512, True)


def test_fields_override_a_preset() -> None:
    config = architecture(preset="26m", layers=4, rope_theta=5e4).config(INDEX)
    assert (config.num_hidden_layers, config.hidden_size, config.rope_theta) == (4, 512, 5e4)
    shown = architecture(preset="26m", layers=4).model_dump()
    assert (shown["preset"], shown["layers"], shown["intermediate_size"]) == ("26m", 4, 1408)
    assert architecture(**shown) == architecture(preset="26m", layers=4)
    sized = architecture(size=4e7)
    assert architecture(**sized.model_dump()).config(INDEX) == sized.config(INDEX)


def test_a_shape_by_its_fields_fills_in_the_rest() -> None:
    config = architecture(hidden_size=128, layers=2, heads=4).config(INDEX)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (32, 4, 352)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"preset": "26m", "size": "40m"}, "preset 26m and size 40m state the model twice; keep one"),
        (
            {"preset": "26m", "hidden_size": 128, "layers": 4},
            "26m and hidden_size 128, layers 4 state",
        ),
        ({"preset": "27m"}, "preset: input should be '4m', '26m', '31m', '64m' or '110m'"),
        ({"size": "many"}, "size: .*valid integer"),
        ({"size": 10}, "size: .*100000"),
        ({}, "hidden_size is missing; give a preset .4m, 26m, 31m, 64m, 110m., a size, or the shape"),
        ({"layers": 3}, "hidden_size is missing"),
        ({"hidden_size": 100, "layers": 2, "heads": 8, "head_dim": 7}, "head_dim even"),
        ({"hidden_size": 100, "layers": 2, "heads": 20}, "100 over 20 heads is no even head_dim"),
    ],
)
def test_what_is_stated_twice_or_not_at_all_is_an_error(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        architecture(**fields)


def test_a_size_that_the_stated_shape_cannot_have_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"size 40,000,000 cannot be met with hidden_size 512, layers 4, .*nearest"
    ):
        architecture(size="40m", hidden_size=512, layers=4).config(INDEX)
    with pytest.raises(
        UserError, match="no model of 200,000 weights has any shape and a vocabulary of 32,000"
    ):
        shape_of_size(200_000, 32_000, {})
