"""Train a byte-level BPE with Hugging Face tokenizers: `train_from_iterator` over JSONL, GPT-2's pattern."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def texts(paths: list[str]) -> Iterator[str]:
    """The texts of JSONL files."""
    for path in paths:
        with Path(path).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def main() -> None:
    """OUT VOCAB SPECIAL,SPECIAL… FILE…"""
    out, size, special, *paths = sys.argv[1:]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(size),
        special_tokens=special.split(","),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts(paths), trainer)
    inner.save(out)
    print(json.dumps({"versions": {"tokenizers": importlib.metadata.version("tokenizers")}}))


if __name__ == "__main__":
    main()
