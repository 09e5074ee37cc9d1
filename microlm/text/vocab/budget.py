"""What a vocabulary costs a model: its embedding's share of the parameters, its work for a byte of text.

Counts are of a stock Qwen3 decoder without biases (see `model/transformer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from microlm.core.errors import UserError
from microlm.core.recipe import nearest


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder without its vocabulary."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def body(self) -> int:
        """Parameters but for embedding and head."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads) + 2 * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden

    def embedding(self, vocab_size: int, *, tied: bool) -> int:
        """Parameters of the embedding, and of the head where it is another matrix."""
        return vocab_size * self.hidden * (1 if tied else 2)

    def share(self, vocab_size: int, *, tied: bool) -> float:
        """The embedding's part of all parameters, 0 to 1."""
        embedding = self.embedding(vocab_size, tied=tied)
        return embedding / (embedding + self.body)

    def work(self, vocab_size: int, bytes_per_token: float) -> float:
        """Multiply-adds for a byte of text: every weight of the body and of the head once a token."""
        return (self.body + self.hidden * vocab_size) / bytes_per_token


PRESETS = {
    shape.name: shape
    for shape in (
        Shape("4m", 192, 6, 512, 6, 6, 32),
        Shape("26m", 512, 8, 1408, 8, 2, 64),
        Shape("31m", 512, 8, 1344, 8, 8, 64),
        Shape("64m", 768, 8, 2432, 8, 4, 96),
        Shape("110m", 768, 12, 2048, 12, 12, 64),
    )
}


def shape(word: str) -> Shape:
    """A preset by its name, or HIDDENxLAYERS: heads of 64, an inner width of 8/3 in steps of 64."""
    if word in PRESETS:
        return PRESETS[word]
    hidden, _, layers = word.partition("x")
    if not (hidden.isdecimal() and layers.isdecimal()):
        raise UserError(f"--model '{word}': {nearest(word, PRESETS)}, or HIDDENxLAYERS such as 512x8")
    return custom(int(hidden), int(layers))


def custom(hidden: int, layers: int) -> Shape:
    """A decoder of usual proportions."""
    if hidden < 64 or hidden % 64 or not 1 <= layers <= 1000:
        raise UserError(f"--model {hidden}x{layers}: hidden must be a multiple of 64, layers 1 to 1000")
    inner = 64 * round(hidden * 8 / 3 / 64)
    return Shape(f"{hidden}x{layers}", hidden, layers, inner, hidden // 64, hidden // 64, 64)


def rows(
    shapes: list[Shape], sizes: dict[str, int], density: dict[str, float | None]
) -> list[dict[str, Any]]:
    """One row for each vocabulary and model. `sizes`: name → entries; `density`: name → bytes per token."""
    return [
        {
            "tokenizer": name,
            "vocab_size": size,
            "model": s.name,
            "body": s.body,
            "share_tied": s.share(size, tied=True),
            "share_untied": s.share(size, tied=False),
            "parameters_tied": s.body + s.embedding(size, tied=True),
            "parameters_untied": s.body + s.embedding(size, tied=False),
            "bytes_per_token": density[name],
            "work_per_byte": s.work(size, d) if (d := density[name]) else None,
        }
        for name, size in sizes.items()
        for s in shapes
    ]
