"""What the benchmark of decoding runs on: a random model as HF directory and as GGUF files, and prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microlm.model import directory
from microlm.model.config import ModelConfig
from microlm.model.presets import PRESETS, Shape
from microlm.model.transformer import Decoder, initialise
from microlm.text.tokenizer import copy_files

READY = Path(__file__).parents[2] / "microlm" / "ready" / "zh-6400"
VOCAB, WINDOW = 6400, 1024
Ids = list[int]


def config_of(quick: bool) -> ModelConfig:
    """The 25.8M model; quick: two of its layers."""
    shape = PRESETS["26m"]
    if quick:
        shape = Shape(512, 2, 8, 2, 64, 1408, "llama", tied=True)
    return shape.config(VOCAB, WINDOW, 1e6, eos=2, pad=0)


def write_model(folder: Path, config: ModelConfig) -> Path:
    """Random bf16 weights with the ready tokenizer."""
    decoder = Decoder(config)
    initialise(decoder, torch.Generator().manual_seed(0), plain=True)
    directory.save(decoder, folder, torch.bfloat16)
    copy_files(READY, folder)
    return folder


def prompts(count: int, length: int, *names: object) -> list[Ids]:
    """Random ids, other ones for other names: nothing is in a cache already."""
    rng = random.Random(repr(names))
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for _ in range(count)]


def write_gguf(model: Path, file: Path, kind: str) -> Path:
    """The directory's weights as GGUF: BF16, Q8_0 or Q4_0 matrices, float32 norms."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    quantized = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(file), "llama")
    _write_shape(writer, config)
    _write_vocabulary(writer, model, config["vocab_size"])
    for name, weight in load_file(model / "model.safetensors").items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        turned = next((h for part, h in heads.items() if part in name), None)
        values = (weight if turned is None else _interleaved(weight, turned)).float().numpy()
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name), values)
        else:
            packed = gguf.quants.quantize(values, quantized)
            writer.add_tensor(_gguf_name(name), packed, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])


def _write_vocabulary(writer: Any, model: Path, size: int) -> None:
    import gguf

    data = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    names = {i: name for name, i in {**data["model"]["vocab"], **special}.items()}
    kind = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kind.CONTROL if names.get(i) in special else kind.NORMAL for i in range(size)])
    merges = data["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q and k in the order of llama.cpp's rotation: pairs side by side."""
    size = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, size, -1).swapaxes(1, 2).reshape(weight.shape)


_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _gguf_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_PARTS[part.removesuffix('.weight')]}.weight"
