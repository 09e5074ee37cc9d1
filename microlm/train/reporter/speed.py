"""How fast the steps since the last row were: tokens/s, share of the device's peak, wait for data, memory."""

from __future__ import annotations

import time

from microlm.core import runtime
from microlm.core.peak import peak_flops
from microlm.model import lora
from microlm.model.transformer import Decoder
from microlm.train.batches import Stream
from microlm.train.job import LoopRecipe

TIMED = ("tokens_per_s", "mfu", "data_wait_share", "peak_memory_bytes")
"""The columns of a row that another run of the same steps would not repeat."""


class Speed:
    """Counts from `start()` on; `step(n)` after each step; `row()` tells and begins anew."""

    def __init__(self, decoder: Decoder, loop: LoopRecipe, stream: Stream, ranks: int) -> None:
        self._stream = stream
        self._body, self._head = position_flops(decoder, loop.context)
        self._peak = peak_flops(decoder.compute_dtype) * ranks
        self._forget()

    def start(self) -> None:
        """Time runs from here: what came before (a validation, samples) was no step."""
        self._mark, self._waited = time.perf_counter(), self._stream.waited_s

    def step(self, positions: int) -> None:
        """A step over so many positions has ended."""
        now = time.perf_counter()
        self._positions += positions
        self._seconds += now - self._mark
        self._wait += self._stream.waited_s - self._waited
        self._mark, self._waited = now, self._stream.waited_s

    def row(self) -> dict[str, float]:
        """The `TIMED` columns of the steps since the last row."""
        seconds = max(self._seconds, 1e-9)
        flops = self._positions * self._body + (self._stream.labels - self._labels) * self._head
        values = (
            self._positions / seconds,
            flops / seconds / self._peak,
            self._wait / seconds,
            float(runtime.peak_memory_bytes()),
        )
        self._forget()
        return dict(zip(TIMED, values, strict=True))

    def _forget(self) -> None:
        self._positions, self._seconds, self._wait = 0, 0.0, 0.0
        self._labels = self._stream.labels
        self.start()


def position_flops(decoder: Decoder, context: int) -> tuple[float, float]:
    """FLOPs of a training step for each position, and for each label on top (the head runs only there).

    A weight costs 2 forward, 2 for its input's gradient, 2 for its own if it is trained; attention counts in
    full, as in PaLM (2204.02311, appendix B).
    """
    parts = decoder.config.parameter_parts()
    adapters = sum(p.numel() for p in lora.adapter_parameters(decoder))
    weight = 4 if adapters else 6
    width = decoder.config.num_attention_heads * decoder.config.head_dim
    attention = 12 * decoder.config.num_hidden_layers * width * context
    body = weight * (parts["attention"] + parts["mlp"]) + 6 * adapters + attention
    return body, weight * decoder.config.vocab_size * decoder.config.hidden_size
