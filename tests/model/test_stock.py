"""Our decoder = transformers', for each architecture; saved = loaded; bad directories are sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import random_decoder, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from microlm.core.errors import UserError
from microlm.model import directory
from microlm.model.config import ModelConfig, ModelType
from microlm.model.transformer import Decoder, causal_attend, initialise, masked_attention

IDS = torch.tensor([[5, 7, 2, 250, 0, 31, 99, 4], [1, 1, 2, 3, 5, 8, 13, 21]])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_transformers(tmp_path: Path, kind: ModelType, tied: bool) -> None:
    ours = random_decoder(tiny_config(kind, tie_word_embeddings=tied, rope_theta=123_456.0))
    directory.save(ours, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert (ours(IDS) - theirs(IDS).logits).abs().max() <= 1e-4
    assert theirs.generation_config.eos_token_id == 2
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in stored) != tied


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_we_read_what_transformers_writes(tmp_path: Path, kind: ModelType) -> None:
    directory.save(random_decoder(tiny_config(kind)), tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    back = directory.load(tmp_path / "theirs")
    assert back.config == directory.read_config(tmp_path / "ours")
    with torch.no_grad():
        assert (back(IDS) - theirs(IDS).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_are_the_saved_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    decoder = random_decoder(tiny_config())
    directory.save(decoder, tmp_path, dtype)
    loaded = dict(directory.load(tmp_path).named_parameters())
    for name, weight in decoder.named_parameters():
        assert torch.equal(loaded[name], weight.to(dtype).float()), name
    held = directory.load(tmp_path, weight_dtype=torch.bfloat16)
    for name, weight in held.named_parameters():
        assert torch.equal(weight, loaded[name].bfloat16()) and weight.dtype == torch.bfloat16, name
    again = tmp_path / "again"
    directory.save(directory.load(tmp_path), again, dtype)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_rows_and_positions_do_not_touch_each_other() -> None:
    decoder = random_decoder(tiny_config())
    with torch.no_grad():
        both, first = decoder(IDS), decoder(IDS[:1, :5])
        rows = torch.arange(8).expand(2, 8)
        by_row = decoder.logits(decoder.hidden(IDS, rows, causal_attend))
    torch.testing.assert_close(both[:1, :5], first, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_row, both, rtol=0, atol=1e-5)


def test_attention_with_the_causal_mask_is_causal() -> None:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(masked_attention(q, k, v, mask), causal_attend(0, q, k, v))


def test_only_relative_positions_count() -> None:
    decoder = random_decoder(tiny_config())
    with torch.no_grad():
        here = decoder.hidden(IDS, torch.arange(8), causal_attend)
        there = decoder.hidden(IDS, torch.arange(8) + 40, causal_attend)
    torch.testing.assert_close(here, there, rtol=0, atol=2e-4)


def test_bfloat16_products_keep_float32_masters() -> None:
    decoder = Decoder(tiny_config(), torch.bfloat16)
    decoder.load_state_dict(random_decoder(tiny_config()).state_dict())
    logits = decoder(IDS)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in decoder.parameters() if p.grad is not None)
    exact = random_decoder(tiny_config())(IDS)
    assert torch.nn.functional.cosine_similarity(logits.flatten(), exact.flatten(), dim=0) > 0.99


def test_initial_blocks_are_the_identity_and_depend_on_the_seed_only() -> None:
    def fresh(seed: int) -> Decoder:
        decoder = Decoder(tiny_config())
        initialise(decoder, torch.Generator().manual_seed(seed))
        return decoder

    first, second, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    embedded = torch.nn.functional.embedding(IDS, first.model.embed_tokens.weight)
    hidden = first.hidden(IDS, torch.arange(8), causal_attend)
    torch.testing.assert_close(hidden, first.model.norm(embedded))


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rotary scaling"),
        (
            {"model_type": "qwen3_moe"},
            "'qwen3_moe' is not supported; supported: llama,",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partly rotated"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"rope_parameters": "default"}, "rope_parameters must be an object"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"attention_bias": True}, "biases are not supported"),
        ({"hidden_size": "wide"}, "must be a whole number"),
        ({"hidden_size": float("inf")}, "must be a whole number"),
        ({"num_attention_heads": 0}, "at least 1|whole number"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"head_dim": 7}, "do not fit"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"vocab_size": 299}, "has shape"),
        ({"num_hidden_layers": 3}, "lack 'model.layers.2"),
        ({"num_hidden_layers": 1}, "unknown 'model.layers.1"),
        ({"tie_word_embeddings": "yes", "vocab_size": None}, "whole number"),
    ],
)
def test_a_foreign_config_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    directory.save(random_decoder(tiny_config()), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=sentence):
        directory.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_config_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: "):
        directory.load(tmp_path)


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        directory.load(tmp_path)
    with pytest.raises(UserError, match="key 'hidden_size' is missing"):
        ModelConfig.from_hf({"model_type": "llama", "num_attention_heads": 1}, "config.json")
    directory.save(random_decoder(tiny_config()), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        directory.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_weights_are_one_sentence(tmp_path: Path, keep: float) -> None:
    directory.save(random_decoder(tiny_config()), tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    size = keep if isinstance(keep, int) else int(len(data) * keep)
    file.write_bytes(data[:size])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        directory.load(tmp_path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    directory.save(random_decoder(tiny_config()), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.extra": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"unknown 'model\.extra'"):
        directory.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_go_into_shards_that_transformers_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    decoder = random_decoder(tiny_config("qwen2", tie_word_embeddings=True))
    directory.save(decoder, tmp_path, dtype)  # a single file first: it must not survive
    directory.save(decoder, tmp_path, dtype, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    sizes = {f: sum(t.nbytes for t in load_file(tmp_path / f).values()) for f in files}
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    table = 300 * 32 * dtype.itemsize  # one tensor may be larger than a shard
    assert max(sizes.values()) <= max(20_000, table)
    back = directory.load(tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert (back(IDS) - theirs(IDS).logits).abs().max() <= 1e-4
    directory.save(decoder, tmp_path, dtype)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]


def test_a_shard_that_is_missing_or_outside_is_named(tmp_path: Path) -> None:
    directory.save(random_decoder(tiny_config()), tmp_path, shard_bytes=20_000)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_bytes())
    gone = sorted(tmp_path.glob("model-*"))[1]
    gone.rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"index\.json: names the file 'model-00002-of"):
        directory.load(tmp_path)
    (tmp_path / "kept").rename(gone)
    for content, told in (
        ({"weight_map": {"a": "../x.safetensors"}}, "names the file '../x.safetensors'"),
        ({"weight_map": []}, "holds no 'weight_map'"),
        ({"weight_map": index["weight_map"] | {"model.norm.weight": 3}}, "holds no 'weight_map'"),
    ):
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(UserError, match=told):
            directory.load(tmp_path)


def test_qwen3_without_a_head_dim_means_what_transformers_takes(tmp_path: Path) -> None:
    directory.save(random_decoder(tiny_config("qwen3", head_dim=128)), tmp_path)
    data = json.loads((tmp_path / "config.json").read_bytes())
    data.pop("head_dim")
    (tmp_path / "config.json").write_text(json.dumps(data), encoding="utf-8")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert (directory.load(tmp_path)(IDS) - theirs(IDS).logits).abs().max() <= 1e-4
