"""Start = base; merged = unmerged; saved = loaded; only the adapter learns."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import random_decoder, tiny_config
from safetensors.torch import load_file

from microlm.core.errors import UserError
from microlm.model import directory, lora
from microlm.model.lora import ALL_LINEAR, LoraConfig
from microlm.model.transformer import Decoder, initialise

IDS = torch.tensor([[5, 7, 2, 250, 0, 31, 99, 4]])
CONFIG = LoraConfig(rank=4, alpha=8.0)


def adapted_decoder(config: LoraConfig = CONFIG, trained: bool = True, kind: Any = "qwen3") -> Decoder:
    """A random base with an adapter; `trained` gives B values as a training would."""
    decoder = random_decoder(tiny_config(kind))
    lora.apply(decoder, config, torch.Generator().manual_seed(3))
    if trained:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for module in lora.adapted(decoder).values():
                module.lora_B.normal_(0, 0.1, generator=generator)
    return decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_exactly_the_base(dtype: torch.dtype) -> None:
    base, decoder = random_decoder(tiny_config()), adapted_decoder(trained=False)
    base.compute_dtype = decoder.compute_dtype = dtype
    with torch.no_grad():  # with gradients, plain matrices go in one product and adapted ones do not
        assert torch.equal(decoder(IDS), base(IDS))


def test_the_seed_decides_the_start() -> None:
    first, second = (adapted_decoder(trained=False) for _ in range(2))
    pairs = zip(lora.adapter_parameters(first), lora.adapter_parameters(second), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for module in lora.adapted(first).values():
        assert not module.lora_B.any()
        assert 0 < module.lora_A.abs().max() <= module.base.in_features**-0.5


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("down_proj",)])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_merged_is_unmerged(targets: Any, kind: Any) -> None:
    decoder = adapted_decoder(LoraConfig(3, 7.0, targets), kind=kind)
    plain = random_decoder(tiny_config(kind))
    with torch.no_grad():
        before, base = decoder(IDS), plain(IDS)
        lora.merge(decoder)
        after = decoder(IDS)
    assert (before - after).abs().max() <= 1e-5
    assert (before - base).abs().max() > 1e-2
    assert [n for n, _ in decoder.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not lora.adapted(decoder) and all(p.requires_grad for p in decoder.parameters())


@pytest.mark.parametrize("rslora", [False, True])
def test_unmerged_is_the_base(rslora: bool) -> None:
    config = LoraConfig(4, 8.0, rslora=rslora)
    decoder, base = adapted_decoder(config), random_decoder(tiny_config())
    pairs = lora.pairs_of(decoder)
    lora.merge(decoder)
    moved = (decoder(IDS) - base(IDS)).abs().max()
    lora.unmerge(decoder, config, pairs)
    assert moved > 1e-2 and (decoder(IDS) - base(IDS)).abs().max() <= 1e-4
    for name, weight in base.named_parameters():
        assert torch.allclose(decoder.get_parameter(name), weight, atol=1e-6)


def test_the_rank_stabilised_scale() -> None:
    assert (LoraConfig(16, 8.0).scale, LoraConfig(16, 8.0, rslora=True).scale) == (0.5, 2.0)


@pytest.mark.parametrize("base", ["compute", "int8"])
def test_a_tied_head_stays_tied_and_the_adapter_in_float32(base: Any) -> None:
    decoder = random_decoder(tiny_config(tie_word_embeddings=True))
    decoder.compute_dtype = torch.bfloat16
    wanted = random_decoder(tiny_config(tie_word_embeddings=True))
    wanted.compute_dtype = torch.bfloat16
    lora.apply(decoder, LoraConfig(2, 4.0, base=base), None)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert {p.dtype for p in lora.adapter_parameters(decoder)} == {torch.float32}
    held = {p.dtype for p in decoder.parameters() if not p.requires_grad}
    assert held == {torch.bfloat16} | ({torch.int8} if base == "int8" else set())
    with torch.no_grad():
        if base == "compute":
            assert torch.equal(decoder(IDS), wanted(IDS))
            lora.merge(decoder)
            assert decoder.lm_head.weight is decoder.model.embed_tokens.weight


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["as_loaded", "compute", "int8"])
def test_the_adapter_is_where_the_weights_are(base: Any) -> None:
    decoder = random_decoder(tiny_config()).cuda()
    lora.apply(decoder, LoraConfig(2, 4.0, dropout=0.5, base=base), torch.Generator().manual_seed(0))
    assert {p.device.type for p in decoder.parameters()} == {"cuda"}
    ids = IDS.cuda()
    with lora.dropping(decoder, 1, 0, ids.shape):
        decoder(ids).sum().backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in lora.adapter_parameters(decoder))


def test_without_weights_there_is_nothing_to_adapt(tmp_path: Path) -> None:
    fresh = Decoder(tiny_config())
    with pytest.raises(UserError, match=r"weights of this decoder were not loaded yet.*load them first"):
        lora.apply(fresh, CONFIG, None)
    assert not lora.adapted(fresh) and all(p.requires_grad for p in fresh.parameters())
    initialise(fresh, torch.Generator().manual_seed(0))
    directory.save(fresh, tmp_path)
    for decoder in (fresh, directory.load(tmp_path)):
        lora.apply(decoder, CONFIG, None)


def test_only_the_adapter_learns() -> None:
    decoder = adapted_decoder()
    base = {n: p.clone() for n, p in decoder.named_parameters() if "lora_" not in n}
    parameters = lora.adapter_parameters(decoder)
    assert {id(p) for p in parameters} == {id(p) for p in decoder.parameters() if p.requires_grad}
    assert len(parameters) == 2 * len(ALL_LINEAR) * decoder.config.num_hidden_layers
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [p.clone() for p in parameters]
    decoder(IDS).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, base[n]) and p.grad is None for n, p in decoder.named_parameters() if n in base)
    assert all(not torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


def test_masters_stay_float32_when_products_are_bfloat16() -> None:
    decoder = adapted_decoder()
    decoder.compute_dtype = torch.bfloat16
    decoder(IDS).sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lora.adapter_parameters(decoder))  # type: ignore[union-attr]


def test_compiled_is_eager() -> None:
    decoder = adapted_decoder()
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS), decoder(IDS))


@pytest.mark.parametrize("targets", ["all-linear", ("gate_proj", "k_proj")])
def test_saved_is_loaded_bit_for_bit(tmp_path: Path, targets: Any) -> None:
    decoder = adapted_decoder(LoraConfig(3, 7.5, targets))
    lora.save_adapter(decoder, tmp_path, "runs/base", "digest")
    loaded = random_decoder(tiny_config())
    lora.load_adapter(loaded, tmp_path, "digest")
    assert torch.equal(loaded(IDS), decoder(IDS))
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "lora_" not in n)
    lora.save_adapter(loaded, tmp_path / "again", "runs/base", "digest")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_names_and_config_are_peft_s(tmp_path: Path) -> None:
    lora.save_adapter(adapted_decoder(), tmp_path, "runs/base", "abc")
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    head = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {f"{head}.lora_A.weight", f"{head}.lora_B.weight"} < names and len(names) == 28
    config = json.loads((tmp_path / "adapter_config.json").read_bytes())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    assert expected.items() <= config.items()
    assert config["base_model_name_or_path"] == "runs/base" and config["microlm_base_digest"] == "abc"


def test_another_base_is_refused(tmp_path: Path) -> None:
    lora.save_adapter(adapted_decoder(), tmp_path, "base", "a" * 64)
    decoder = random_decoder(tiny_config())
    with pytest.raises(UserError, match="made for model aaaaaaaaaaaa…, this one is bbbbbbbbbbbb…"):
        lora.load_adapter(decoder, tmp_path, "b" * 64)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "microlm_base_digest": None}))
    with pytest.raises(UserError, match="does not say which model it was made for, so it cannot be checked"):
        lora.load_adapter(decoder, tmp_path, "b" * 64)
    assert not lora.adapted(decoder)
    lora.load_adapter(decoder, tmp_path)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    lora.save_adapter(adapted_decoder(), tmp_path, "base", "a")
    with pytest.raises(UserError, match="has shape"):
        lora.load_adapter(random_decoder(tiny_config(intermediate_size=64)), tmp_path)
    with pytest.raises(UserError, match="is not in both"):
        lora.load_adapter(random_decoder(tiny_config(num_hidden_layers=3)), tmp_path)


def test_wrong_use_is_refused() -> None:
    decoder = random_decoder(tiny_config())
    with pytest.raises(UserError, match="rank is 0"):
        lora.apply(decoder, LoraConfig(0, 1.0), None)
    with pytest.raises(UserError, match="no matrix 'w_proj'"):
        lora.apply(copy.deepcopy(decoder), LoraConfig(1, 1.0, ("q_proj", "w_proj")), None)
    with pytest.raises(UserError, match="no adapter to save"):
        lora.save_adapter(decoder, Path("nowhere"), "base", "a")
    lora.apply(decoder, CONFIG, None)
    with pytest.raises(UserError, match="adapter already"):
        lora.apply(decoder, CONFIG, None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"use_dora": True}, "'use_dora' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is not supported"),
        ({"bias": "all"}, "trained biases"),
        ({"target_modules": "q_proj|v_proj"}, "'target_modules' must be"),
        ({"target_modules": None}, "'target_modules' must be"),
        ({"target_modules": ["lm_head"]}, "no matrix 'lm_head'"),
        ({"r": "4"}, "'r' must be a number"),
        ({"r": 0}, "rank is 0"),
        ({"r": 5}, "has shape"),
    ],
)
def test_a_foreign_adapter_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    lora.save_adapter(adapted_decoder(), tmp_path, "base", "a")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes), encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        lora.load_adapter(random_decoder(tiny_config()), tmp_path)


def test_damaged_adapter_files_are_one_sentence(tmp_path: Path) -> None:
    decoder = random_decoder(tiny_config())
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        lora.load_adapter(decoder, tmp_path)
    lora.save_adapter(adapted_decoder(), tmp_path, "base", "a")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        lora.load_adapter(decoder, tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        lora.load_adapter(random_decoder(tiny_config()), tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"{")
    with pytest.raises(UserError, match="not valid JSON"):
        lora.load_adapter(decoder, tmp_path)
