"""Token sets as they grow. Enters: samples of ids. Leaves: the files of each set, and what the index says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microlm.core import storage
from microlm.text.tokenizer import Tokenizer

SCHEMA = 1
DOCUMENTS, CONVERSATIONS, PREFERENCES = KINDS = ("documents", "conversations", "preferences")


@dataclass(frozen=True, slots=True)
class Samples:
    """Ids of samples in a row, the size of each, and their masks (uint8) unless they are documents.

    `stored` are the same with files in place of ids and masks.
    """

    ids: Any
    sizes: NDArray[np.int64]
    loss: Any

    def stored(self, stem: Path) -> Samples:
        """The same in files that are named after `stem`."""
        return Samples(_store(self.ids, f"{stem}.ids"), self.sizes, _store(self.loss, f"{stem}.loss"))

    def loaded(self) -> Samples:
        """The same in memory; the files are gone."""
        return Samples(_load(self.ids), self.sizes, _load(self.loss))


class TokenSets:
    """The token sets of a folder, as they grow."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self._folder, self._dtype = folder, dtype
        self._counts: dict[str, dict[str, int]] = {}

    @property
    def tokens(self) -> int:
        """Ids in all sets."""
        return sum(counts["tokens"] for counts in self._counts.values())

    def open(self, name: str) -> dict[str, int]:
        """The counts of a set, which is there from now on, if only as empty files."""
        if name not in self._counts:
            self._counts[name] = {"samples": 0, "tokens": 0, "labels": 0}
            self._append(f"{name}.tokens.bin", b"")
            self._append(f"{name}.ends.bin", b"")
        return self._counts[name]

    def add(self, name: str, samples: Samples) -> None:
        """Append samples to a set."""
        counts = self.open(name)
        self._append(f"{name}.tokens.bin", samples.ids.astype(self._dtype, copy=False).data)
        ends = (counts["tokens"] + np.cumsum(samples.sizes)).astype("<i8", copy=False)
        self._append(f"{name}.ends.bin", ends.data)
        if samples.loss is not None:
            self._append(f"{name}.loss.bin", samples.loss.data)
        counts["samples"] += len(samples.sizes)
        counts["tokens"] += len(samples.ids)
        counts["labels"] += len(samples.ids) if samples.loss is None else int(samples.loss.sum())

    def index(self, tokenizer: Tokenizer, splits: Iterable[str]) -> dict[str, Any]:
        """What `index.json` says: split by split, documents first, then the others' tasks by name."""
        order = list(dict.fromkeys(splits))

        def place(name: str) -> tuple[int, int, str]:
            return order.index(name.rpartition("-")[2]), KINDS.index(name.partition("-")[0]), name

        return {
            "schema": SCHEMA,
            "dtype": self._dtype.str,
            "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
            "sets": {name: self._counts[name] for name in sorted(self._counts, key=place)},
        }

    def _append(self, name: str, data: bytes | memoryview) -> None:
        with storage.explain_write(self._folder), (self._folder / name).open("ab") as file:
            file.write(data)


def _store(array: Any, path: str) -> Any:
    """An array → the file that holds it now; anything else as it is."""
    if not isinstance(array, np.ndarray):
        return array
    np.save(path, array)
    return Path(f"{path}.npy")


def _load(array: Any) -> Any:
    """A file → the array in it, and the file goes; anything else as it is."""
    if not isinstance(array, Path):
        return array
    found = np.load(array)
    array.unlink()
    return found
