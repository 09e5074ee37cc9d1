"""A random model with merges in its tokenizer, of any stock architecture: 2 layers, d 32, grouped heads."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from microlm.model.config import ModelConfig, ModelType
from microlm.model.directory import save
from microlm.model.transformer import Decoder
from microlm.text.tokenizer import SPECIAL

TEXTS = [
    "李白是唐代诗人。李白写诗。",
    "杜甫也是诗人。",
    'hello world, {"a":{"b":"c"}}',
    "the poet wrote 12 poems 😀",
]
WINDOW = 128


def write_model(folder: Path, kind: ModelType, vocab_size: int = 320, seed: int = 0) -> Path:
    """An HF directory with random weights, far from the identity, and a tokenizer trained on four lines."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    config = ModelConfig(
        vocab_size=inner.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=WINDOW,
        rope_theta=10_000.0,
        model_type=kind,
        eos_token_id=2,
        pad_token_id=0,
    )
    decoder, generator = Decoder(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(decoder.named_parameters()):
            if weight.dim() == 2:
                weight.normal_(0.0, 0.25, generator=generator)
            else:
                weight.uniform_(0.5, 1.5, generator=generator)
    save(decoder, folder)
    inner.save(str(folder / "tokenizer.json"))
    return folder
