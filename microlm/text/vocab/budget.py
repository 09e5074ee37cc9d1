"""What a vocabulary costs a model: its embedding's share of the parameters, its work for a byte of text.

The shapes come from above: `model/presets` knows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder without its vocabulary: its width, and its parameters but for embedding and head."""

    name: str
    hidden: int
    body: int

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
