"""Log-probabilities as decoding sees them: through pages of the KV cache, with all that it rounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from microlm.core.errors import UserError
from microlm.engine.cache.pages import PagePool, pages_for
from microlm.engine.forward.batch import Span, batch_of
from microlm.engine.forward.runner import Runner
from microlm.engine.forward.whole import chosen


def cached_logprobs(runner: Runner, pool: PagePool, sequence: Sequence[int], size: int) -> list[float]:
    """Natural-log probability of every id but the first, in pieces of `size`; the pages are given back."""
    count = pages_for(len(sequence))
    pages = pool.take(count)
    if pages is None:
        raise UserError(
            f"logprobs: a sequence of {len(sequence)} tokens needs {count} pages, {pool.free} are free; "
            "wait until requests have ended, or raise kv_memory"
        )
    values: list[float] = []
    try:
        runner.store.clear(pages)
        table = np.array(pages, dtype=np.int32)
        for start in range(0, len(sequence) - 1, size):
            tokens = sequence[start : min(start + size, len(sequence) - 1)]
            scores = runner.forward(batch_of([Span(tokens, start, table, len(tokens))]))
            following = sequence[start + 1 : start + 1 + len(tokens)]
            values += chosen(scores, torch.tensor(following, device=scores.device))
    finally:
        pool.give_back(pages)
    return values
