"""What the loop asks of a run's data: rows that are read, or answers that the model itself gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

from microlm.train.batches.batch import Batch


class Stream(Protocol):
    """Endless batches. `waited_s` and `labels` grow by the wait for each batch and by its labels."""

    waited_s: float
    labels: int

    def __next__(self) -> Batch: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def state(self) -> dict[str, Any]:
        """The place after the last batch that was taken, as JSON values; in it all `rows` and `padding`."""
        ...

    def watch(self, check: Callable[[], None]) -> None:
        """`check` is called while a batch is made that takes long; what it raises gives it up."""
        ...


class Rows(Protocol):
    """Where batches come from."""

    def batches(self, rows: int, state: dict[str, Any] | None = None, workers: int = 0) -> Stream:
        """Batches of `rows` rows (or as many as they need), from the beginning or from a stream's state."""
        ...

    def told(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What a manifest tells of them, up to a stream's state: how often each part was read, say."""
        ...
