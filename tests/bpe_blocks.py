"""Blocks of given texts, and what `tokenizers` learns from the same; for tests of training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from microlm.text.bpe.files import assemble
from microlm.text.bpe.learn.choose import Choice
from microlm.text.bpe.pieces import Pieces
from microlm.text.bpe.train import Plan, Trained, train
from microlm.text.sources import Tally


@dataclass(frozen=True)
class Texts:
    """A block of some texts."""

    some: tuple[str, ...]
    held: int = 0

    @property
    def size(self) -> int:
        return sum(map(len, self.some))

    def texts(self, tally: Tally) -> Iterator[list[str]]:
        for text in self.some:
            tally.keep()
            yield [text]


def learnt(texts: Sequence[str], room: int, pieces: Pieces | None = None, **fields: Any) -> Trained:
    """What we learn from these texts, in blocks of three."""
    blocks = [Texts(tuple(texts[i : i + 3])) for i in range(0, len(texts), 3)]
    return train(blocks, Plan(room, pieces or Pieces(), **fields))


def as_model(choice: Choice) -> dict[str, Any]:
    """Vocabulary and merges as a tokenizer.json has them, without control tokens."""
    model = json.loads(assemble(choice, Pieces(), ()).to_str())["model"]
    return {"vocab": model["vocab"], "merges": model["merges"]}


def theirs(texts: Sequence[str], room: int, pieces: Pieces, min_frequency: int) -> dict[str, Any]:
    """Vocabulary and merges that the BpeTrainer of `tokenizers` learns from the same pieces."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pieces.pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + room,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    model = json.loads(inner.to_str())["model"]
    return {"vocab": model["vocab"], "merges": model["merges"]}
