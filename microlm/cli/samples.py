"""The engine as training's tool: texts that a half-trained model writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microlm.model.transformer import Decoder


def sample(decoder: Decoder, tokenizer: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    """How the decoder goes on with each prompt, greedily, as far as its window goes; nothing random moves."""
    from microlm.core.records import Sampling
    from microlm.engine import Engine

    engine = Engine(tokenizer, decoder=decoder, max_seqs=len(prompts))
    return [c.text for c in engine.generate(prompts, Sampling(max_tokens=tokens))]
