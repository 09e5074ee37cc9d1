"""A tiny random model with a byte-level tokenizer, as an HF directory: for tests of server and verify."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from microlm.model import directory
from microlm.model.config import ModelConfig
from microlm.model.transformer import Decoder

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tiny_model(path: Path, seed: int = 0, window: int = 512) -> Path:
    """2 layers, d 32, one token per byte. It says lower-case letters, so that any cut of its text is text."""
    path.mkdir(parents=True, exist_ok=True)
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    inner.save(str(path / "tokenizer.json"))
    config = ModelConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=window,
        rope_theta=10_000.0,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    decoder = Decoder(config)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.4)
        head = dict(decoder.named_parameters())["lm_head.weight"]
        quiet = [i for i, n in enumerate(names) if not (len(n) == 1 and "a" <= n <= "z")]
        head[quiet] *= 0.01
    directory.save(decoder, path)
    return path
