"""Log-probabilities of labels that stay while a batch is learnt: of the weights that drew it, of the start.

Each rank scores the micro-batches that it trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from microlm.model import directory, lora
from microlm.model.transformer import Decoder
from microlm.train.batches import Batch
from microlm.train.batches.rollouts import Scorer
from microlm.train.job import LoopRecipe
from microlm.train.objectives import plain
from microlm.train.objectives.cross_entropy import wide
from microlm.train.objectives.policy import tempered
from microlm.train.ranks import Ranks
from microlm.train.step import Forward, losses, make_forward


class Scores:
    """`Scores(decoder, …)(batch)`: [R,T] on the host, by the very pass that training makes.

    Gradients stay on, unused: so the passes are equal bit for bit, and one compiled block serves both.
    """

    def __init__(
        self,
        decoder: Decoder,
        loop: LoopRecipe,
        ranks: Ranks,
        temperature: float,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._decoder, self._loop, self._ranks, self._within = decoder, loop, ranks, within
        self._objective = plain(lambda hidden, model, batch: tempered(hidden, model, batch, temperature))

    @cached_property
    def _forward(self) -> Forward:
        return make_forward(self._decoder, self._loop)

    def __call__(self, batch: Batch) -> Tensor:
        found = torch.zeros(batch.labels.shape, dtype=wide(self._decoder.compute_dtype))
        size, ranks = self._loop.micro_rows, self._ranks
        with self._within():
            for start in range(ranks.rank * size, len(batch.labels), ranks.size * size):
                piece = batch.rows(start, start + size)
                score = losses(self._forward, self._decoder, piece, self._objective).total
                found[start : start + size] = score.detach().cpu()
        return found


def start_scorer(
    decoder: Decoder, start: Path, loop: LoopRecipe, temperature: float
) -> Callable[[Ranks], Scorer]:
    """Scores of the start, for some ranks: of the decoder without its adapter, or of the weights in a folder.

    Those are held once, in the precision of the products.
    """
    if lora.adapted(decoder):
        return lambda ranks: Scores(decoder, loop, ranks, temperature, lambda: without_adapter(decoder))
    dtype = loop.compute_dtype()
    frozen = directory.load(start, dtype, weight_dtype=dtype).to(decoder.cos.device)
    return lambda ranks: Scores(frozen, loop, ranks, temperature)


@contextmanager
def without_adapter(decoder: Decoder) -> Iterator[None]:
    """The base alone: the updates count nothing meanwhile."""
    modules = list(lora.adapted(decoder).values())
    scales = [m.scale for m in modules]
    for module in modules:
        module.scale = 0.0
    try:
        yield
    finally:
        for module, scale in zip(modules, scales, strict=True):
            module.scale = scale


def drawing_scorers(
    decoder: Decoder, loop: LoopRecipe, ranks: Ranks, temperature: float
) -> Mapping[str, Scorer]:
    """Scores of the weights that draw, for steps that come after the first of a round."""
    found = {"old": Scores(decoder, loop, ranks, temperature)}
    return found if temperature == 1 else {**found, "raw": Scores(decoder, loop, ranks, 1.0)}
