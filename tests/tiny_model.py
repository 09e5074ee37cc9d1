"""A tiny random model with a byte-level tokenizer, as an HF directory: for tests of server and verify."""

from __future__ import annotations

from pathlib import Path

import torch
from artifacts import random_decoder, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from microlm.model import directory
from microlm.text.tokenizer import SPECIAL


def write_tiny_model(path: Path, seed: int = 0, window: int = 512) -> Path:
    """2 layers, d 32, one token per byte. It says lower-case letters, so that any cut of its text is text."""
    path.mkdir(parents=True, exist_ok=True)
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    inner.save(str(path / "tokenizer.json"))
    config = tiny_config(vocab_size=len(names), max_position_embeddings=window)
    decoder = random_decoder(config, seed)
    quiet = [i for i, n in enumerate(names) if not (len(n) == 1 and "a" <= n <= "z")]
    with torch.no_grad():
        decoder.lm_head.weight[quiet] *= 0.01
    directory.save(decoder, path)
    return path
