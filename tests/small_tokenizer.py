"""A small byte-level BPE directory trained by `tokenizers`, as a Hugging Face model carries it. For tests."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import END, MARKS, PAD, SPECIAL, reserved
from microlm.text.vocab import domains

CONTROL = (*SPECIAL, *MARKS, *reserved(7))


def train(pieces: Pieces, size: int = 600) -> HFTokenizer:
    """A tokenizer of `size` entries, learnt from the samples by domain."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pieces.pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text for texts in domains.samples().values() for text in texts], trainer)
    return inner


def write(folder: Path, pieces: Pieces, size: int = 600) -> Path:
    """The directory of such a tokenizer; marks are added tokens that are not special."""
    folder.mkdir(parents=True)
    data = json.loads(train(pieces, size).to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] not in MARKS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
        "clean_up_tokenization_spaces": False, "chat_template": "{{ messages[0].content }}",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
