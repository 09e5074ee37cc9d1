"""How long samples are, and what became of those that no row can hold: counted before training, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 90, 99)
CAP = 1 << 20  # tokens; the percentiles of lengths beyond are the longest


@dataclass(frozen=True)
class Lengths:
    """Of one token set: its samples in tokens, and what is trained on.

    `samples` = those trained on whole + `cut` (which became `pieces`) + `dropped` + `without_labels`.
    `tokens_lost` lie in no row. `eos_cut`: samples of which the EOS of the last answer is not learnt.
    `whole_context`: the context that would hold every sample. `flows`: documents go on in the next row.
    """

    samples: int
    tokens: int
    labels: int
    p50: int
    p90: int
    p99: int
    longest: int
    whole_context: int
    longer: int = 0
    cut: int = 0
    pieces: int = 0
    dropped: int = 0
    without_labels: int = 0
    tokens_lost: int = 0
    labels_lost: int = 0
    eos_cut: int = 0
    flows: bool = False

    @property
    def used(self) -> int:
        """Samples that are trained on, whole or in part."""
        return self.samples - self.dropped - self.without_labels

    def sentence(self) -> str:
        """All of it for people; nothing is said of what did not happen."""
        sizes = f"p50 {self.p50:,}, p90 {self.p90:,}, p99 {self.p99:,}, longest {self.longest:,}"
        parts = [f"{self.samples:,} samples, {self.tokens:,} tokens ({sizes})"]
        if self.flows:
            parts += [f"{self.longer:,} longer than a row go on in the next"] * bool(self.longer)
        elif self.longer:
            parts.append(f"{self.longer:,} longer than a row: {self._fate()}")
        if self.eos_cut:
            parts.append(f"{self.eos_cut:,} lost the EOS of their last answer")
        if self.without_labels:
            parts.append(f"{self.without_labels:,} without a label left out")
        if self.tokens_lost:
            parts.append(f"lost {self.tokens_lost:,} tokens, {self.labels_lost:,} of {self.labels:,} labels")
        return "; ".join(parts)

    def _fate(self) -> str:
        made = (
            f"{self.cut:,} split into {self.pieces:,} pieces"
            if self.pieces > self.cut
            else f"{self.cut:,} cut"
        )
        return ", ".join([made] * bool(self.cut) + [f"{self.dropped:,} dropped"] * bool(self.dropped))


def sentences(lengths: Mapping[str, Lengths], context: int, policy: str) -> Iterator[str]:
    """A line a token set, and what would keep all of them whole."""
    for name, found in lengths.items():
        yield f"{name}: {found.sentence()}"
    talks = [found for found in lengths.values() if not found.flows]
    if any(found.longer for found in talks):
        needed = max(found.whole_context for found in talks)
        yield f"too_long is {policy}; loop.context={needed} (now {context}) would keep every sample whole"


class Histogram:
    """Lengths by how often they occur, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(1, np.int64)
        self.longest = 0

    def add(self, lengths: NDArray[np.int64]) -> None:
        """Count some more."""
        if not len(lengths):
            return
        self.longest = max(self.longest, int(lengths.max()))
        found = np.bincount(np.minimum(lengths, CAP), minlength=len(self._counts))
        found[: len(self._counts)] += self._counts
        self._counts = found

    def percentile(self, share: int) -> int:
        """The smallest length that `share` percent of the samples do not exceed; 0 when there are none."""
        up_to = np.cumsum(self._counts)
        if not up_to[-1]:
            return 0
        found = int(np.searchsorted(up_to, share / 100 * up_to[-1]))
        return self.longest if found == CAP else found
