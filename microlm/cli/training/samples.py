"""The engine as training's tool: texts that a half-trained model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microlm.model.transformer import Decoder


def sample(
    decoder: Decoder, tokenizer: Path, prompts: Sequence[str], tokens: int, check: Callable[[], None]
) -> list[str]:
    """How the decoder goes on with each prompt, greedily, as far as its window goes; nothing random moves.

    `check` is called between tokens; what it raises ends the writing.
    """
    from microlm.core.records import Sampling
    from microlm.engine import Engine

    engine = Engine(tokenizer, decoder=decoder, max_seqs=len(prompts), native=False)
    requests = [engine.add(prompt, Sampling(max_tokens=tokens)) for prompt in prompts]
    while engine.busy:
        check()
        engine.step()
    return [engine.completion(request).text for request in requests]
