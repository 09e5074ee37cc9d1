"""Scaled rotary positions = transformers'; what is not computed is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import random_decoder, tiny_config
from transformers import AutoModelForCausalLM

from microlm.core.errors import UserError
from microlm.model import directory
from microlm.model.config import ModelConfig, ModelType
from microlm.model.rope import RopeScaling, inverse_frequencies, read_scaling

IDS = torch.randint(0, 300, (1, 500), generator=torch.Generator().manual_seed(0))
SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 4.0, 1.0, 4.0, 128),
    "llama3-wide": RopeScaling("llama3", 32.0, 0.5, 8.0, 100),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=list(SCALINGS))
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_scaled_logits_are_those_of_transformers(
    tmp_path: Path, kind: ModelType, scaling: RopeScaling | None
) -> None:
    config = tiny_config(kind, rope_scaling=scaling, max_position_embeddings=512, head_dim=16)
    ours = random_decoder(config)
    directory.save(ours, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        assert (ours(IDS) - theirs(IDS).logits).abs().max() <= 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    assert directory.read_config(tmp_path / "theirs") == directory.read_config(tmp_path / "ours") == config


def test_scaling_changes_the_logits() -> None:
    plain = random_decoder(tiny_config(max_position_embeddings=512))
    for scaling in list(SCALINGS.values())[1:]:
        scaled = random_decoder(tiny_config(max_position_embeddings=512, rope_scaling=scaling))
        with torch.no_grad():
            assert (plain(IDS) - scaled(IDS)).abs().max() > 1e-2


def test_llama3_keeps_fast_angles_and_slows_slow_ones() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 512)
    plain, scaled = (inverse_frequencies(64, 500_000.0, s) for s in (None, scaling))
    turns = 512 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns >= 1) & (turns <= 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_both_spellings_are_read(old: bool) -> None:
    data = tiny_config("llama", rope_scaling=SCALINGS["llama3"]).to_hf("float32")
    data = {k: v for k, v in data.items() if k != ("rope_parameters" if old else "rope_scaling")}
    assert ModelConfig.from_hf(data, "config.json") == tiny_config("llama", rope_scaling=SCALINGS["llama3"])


@pytest.mark.parametrize(
    ("rope", "told"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "rotary scaling 'dynamic' .*linear or llama3",
        ),
        ({"rope_type": "yarn", "factor": 2.0}, "rotary scaling 'yarn' is not supported"),
        ({"type": "longrope"}, "rotary scaling 'longrope'"),
        ({"rope_type": ["linear"]}, "rotary scaling .*'linear'.* is not supported"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5; it must be at least 1"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor is nan"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "low_freq_factor 4.0 and high_freq_factor 1.0 do not fit",
        ),
        ({"full_attention": {"rope_type": "default"}}, "by kind of layer"),
    ],
)
def test_other_scalings_are_refused_by_name(rope: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"config.json: .*{told}"):
        read_scaling(rope, 512, "config.json")


def test_a_missing_key_of_a_scaling_is_named() -> None:
    data = tiny_config("llama").to_hf("float32") | {"rope_parameters": {"rope_type": "linear"}}
    with pytest.raises(UserError, match="key 'factor' is missing"):
        ModelConfig.from_hf(data, "config.json")
