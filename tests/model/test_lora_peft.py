"""Our adapters in PEFT, PEFT's adapters here: equal logits, equal merged weights; what we lack is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from artifacts import random_decoder, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from microlm.core.errors import UserError
from microlm.model import directory, lora
from microlm.model.config import ModelType

IDS = torch.tensor([[5, 7, 2, 250, 0, 31, 99, 4]])
KINDS: tuple[ModelType, ...] = ("llama", "qwen2", "qwen3")
CONFIGS = (
    lora.LoraConfig(4, 8.0),
    lora.LoraConfig(3, 7.5, ("q_proj", "v_proj"), rslora=True),
    lora.LoraConfig(2, 16.0, ("layers.1.mlp.down_proj", "self_attn.o_proj"), dropout=0.2),
)


def write_base(folder: Path, kind: ModelType = "qwen3") -> Path:
    """An HF directory with random weights."""
    directory.save(random_decoder(tiny_config(kind)), folder)
    return folder


def theirs(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def distance(ours: Tensor, other: Any) -> float:
    return float((ours - other(IDS).logits).abs().max())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_our_adapter_in_peft(tmp_path: Path, kind: ModelType, config: lora.LoraConfig) -> None:
    base = write_base(tmp_path / "base", kind)
    decoder, generator = directory.load(base), torch.Generator().manual_seed(0)
    plain = decoder(IDS)
    lora.apply(decoder, config, generator)
    for weight in lora.adapter_parameters(decoder):
        weight.normal_(0, 0.1, generator=generator)
    lora.save_adapter(decoder, tmp_path / "adapter", str(base), "digest")
    wrapped = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter").eval()
    assert distance(decoder(IDS), wrapped) <= 1e-4
    assert (decoder(IDS) - plain).abs().max() > 1e-2
    merged = dict(wrapped.merge_and_unload().named_parameters())
    lora.merge(decoder)
    for name, weight in decoder.named_parameters():
        assert torch.allclose(weight, merged[name], atol=1e-6), name


def train_with_peft(model: PreTrainedModel, folder: Path, **settings: Any) -> peft.PeftModel:
    """Three steps of transformers' Trainer on an adapter, saved by it."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 300, (12, 16))]
    arguments = TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(wrapped, arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(str(folder))
    return wrapped.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
        {"r": 3, "lora_alpha": 9, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    ],
)
def test_peft_s_adapter_here(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base")
    wrapped = train_with_peft(theirs(base), tmp_path / "adapter", **settings)
    decoder = directory.load(base)
    with torch.no_grad():
        assert distance(decoder(IDS), wrapped) > 1e-2
        lora.load_adapter(decoder, tmp_path / "adapter")
        assert distance(decoder(IDS), wrapped) <= 1e-4
        lora.merge(decoder)
        for name, weight in wrapped.merge_and_unload().named_parameters():
            assert torch.allclose(decoder.get_parameter(name), weight, atol=1e-6), name


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_dora": True}, "'use_dora' is not supported"),
        ({"bias": "all"}, "trained biases are not supported"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "'rank_pattern' is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "'alpha_pattern' is not supported"),
        ({"layers_to_transform": [0]}, "'layers_to_transform' is not supported"),
        ({"lora_bias": True}, "'lora_bias' is not supported"),
        ({"trainable_token_indices": [5]}, "'trainable_token_indices' is not supported"),
        ({"target_modules": ".*q_proj"}, "'target_modules' must be all-linear, or a list"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the model has no matrix 'lm_head'"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' is 'pissa', which changes the base"),
    ],
)
def test_what_we_lack_is_refused(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    base = write_base(tmp_path / "base")
    plain = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    peft.get_peft_model(theirs(base), peft.LoraConfig(**(plain | settings))).save_pretrained(tmp_path / "a")
    decoder = directory.load(base)
    with pytest.raises(UserError, match=sentence):
        lora.load_adapter(decoder, tmp_path / "a")
    assert not lora.adapted(decoder)
