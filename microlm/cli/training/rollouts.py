"""The engine as training's tool: who answers prompts by the weights under training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microlm.core.records import Completion, Sampling
    from microlm.core.runtime import Dtype
    from microlm.model.transformer import Decoder
    from microlm.train.batches.answers import Rollout
    from microlm.train.tuning.grpo import GrpoRecipe


def open_rollout(tokenizer: Path, decoder: Decoder, recipe: GrpoRecipe) -> Rollout:
    """One engine over a copy of the live weights, brought up to date before it answers.

    On a CPU an answer is the same bits in any company: so the ranks can share the prompts out.
    """
    import torch

    from microlm.engine import Engine

    how = recipe.answers
    auto: Dtype = "bfloat16" if recipe.loop.compute_dtype() == torch.bfloat16 else "float32"
    named: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16"}
    engine = Engine(
        tokenizer,
        decoder=decoder,
        dtype=named.get(how.precision, auto),
        quantize="int8" if how.precision == "int8" else "none",
        max_seqs=how.rows,
        max_seq_len=recipe.loop.context,
        batch_invariant=decoder.cos.device.type == "cpu",
    )

    def rollout(
        prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], check: Callable[[], None]
    ) -> list[Completion]:
        engine.refresh()
        requests = [
            engine.enqueue(request)
            for prompt, sampling in zip(prompts, samplings, strict=True)
            for request in engine.prepare_many(prompt, sampling, live=False)
        ]
        try:
            while engine.busy:
                check()
                engine.step()
        finally:
            for request in requests:
                engine.cancel(request)
        return [engine.completion(request) for request in requests]

    return rollout
