"""A random model with merges in its tokenizer, of any stock architecture: 2 layers, d 32, grouped heads."""

from __future__ import annotations

from pathlib import Path

from artifacts import random_decoder, tiny_config
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from microlm.model.config import ModelType
from microlm.model.directory import save
from microlm.text.tokenizer import SPECIAL

TEXTS = [
    "李白是唐代诗人。李白写诗。",
    "杜甫也是诗人。",
    'hello world, {"a":{"b":"c"}}',
    "the poet wrote 12 poems 😀",
]
WINDOW = 128


def write_model(
    folder: Path, kind: ModelType, vocab_size: int = 320, seed: int = 0, window: int = WINDOW
) -> Path:
    """An HF directory with random weights, far from the identity, and a tokenizer trained on four lines."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    config = tiny_config(kind, inner.get_vocab_size(), max_position_embeddings=window)
    save(random_decoder(config, seed), folder)
    inner.save(str(folder / "tokenizer.json"))
    return folder
