"""What of a token set is trained on. Enters: a set, and what to do with samples that no row can hold.

Leaves: spans, each a sample of its own from then on, and what was lost, counted. Documents stay as they are:
they go on in the next row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from microlm.text.shards import TokenSet
from microlm.train.batches.lengths import PERCENTILES, Histogram, Lengths

TooLong = Literal["drop", "cut_left", "cut_right", "split"]
"""What becomes of a sample that no row can hold: it is left out, loses a side, or makes several samples."""
POLICIES: tuple[TooLong, ...] = get_args(TooLong)
CHUNK = 1 << 22  # tokens that are looked at at once
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """Stretches [start, end) of a set's tokens, by number, and the sample that each is of.

    Without `starts` they are the samples themselves, each from the end of the one before.
    """

    ends: Numbers
    starts: Numbers | None = None
    samples: Numbers | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, numbers: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Samples, starts and ends of some spans."""
        ends = np.asarray(self.ends[numbers])
        if self.starts is None or self.samples is None:
            return numbers, np.where(numbers > 0, self.ends[numbers - 1], 0), ends
        return self.samples[numbers], self.starts[numbers], ends


def unread(document_mask: bool) -> int:
    """Tokens at a sample's end that fill no position: only a sample that follows could see the last."""
    return 1 if document_mask else 0


def spans_of(tokens: TokenSet, context: int, unread: int, policy: TooLong) -> tuple[Spans, Lengths]:
    """The spans of a set for rows of `context` positions, in the order of the samples, and the counts.

    A span of n tokens fills n - `unread` positions. One without a label is left out.
    """
    room, sizes, counts = context + unread, Histogram(), Counter[str]()
    found: list[tuple[Numbers, ...]] = []
    for first, starts, ends in _chunks(tokens.ends):
        sizes.add(ends - starts)
        counts["samples"] += len(ends)
        counts["tokens"] += int((ends - starts).sum())
        counts["longer"] += int((ends - starts > room).sum())
        if tokens.loss is None:
            counts["labels"] += int(np.maximum(ends - starts - 1, 0).sum())
            counts["without_labels"] += int((ends - starts < 2).sum())
            continue
        labelled = np.flatnonzero(tokens.loss[int(starts[0]) : int(ends[-1])]) + starts[0]
        begins, stops, owners = _chunk(starts, ends, labelled, room, policy, counts)
        found.append((begins, stops, owners + first))
    shares = {f"p{share}": sizes.percentile(share) for share in PERCENTILES}
    told = Lengths(
        **{"samples": 0, "tokens": 0, "labels": 0, **counts, **shares},
        longest=sizes.longest,
        whole_context=max(0, sizes.longest - unread),
        flows=tokens.loss is None,
    )
    if tokens.loss is None or not (told.cut or told.dropped or told.without_labels):
        return Spans(tokens.ends), told
    starts, ends, samples = (np.concatenate(column) for column in zip(*found, strict=True))
    return Spans(ends, starts, samples), told


def cut(starts: Numbers, ends: Numbers, room: int, policy: TooLong) -> tuple[Numbers, Numbers, Numbers]:
    """Starts and ends of stretches of at most `room` tokens, and the number of the sample that each is of.

    Pieces of one sample share a token: the last of one, which it predicts, is the first that the next reads.
    """
    owners = np.arange(len(ends))
    if policy == "cut_left":
        return np.maximum(starts, ends - room), ends, owners
    if policy == "cut_right":
        return starts, np.minimum(ends, starts + room), owners
    if policy == "drop":
        fits = ends - starts <= room
        return starts[fits], ends[fits], owners[fits]
    step = room - 1
    pieces = np.maximum(1, -(-(ends - starts - 1) // step))
    owners = np.repeat(owners, pieces)
    turn = np.arange(len(owners)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begins = starts[owners] + turn * step
    return begins, np.minimum(begins + room, ends[owners]), owners


def _chunk(
    starts: Numbers, ends: Numbers, labelled: Numbers, room: int, policy: TooLong, counts: Counter[str]
) -> tuple[Numbers, Numbers, Numbers]:
    """The spans of some samples and whose they are; `labelled` are the places of their labels."""
    labels = _labels(labelled, starts, ends)
    begins, stops, owners = cut(starts, ends, room, policy)
    learnt = _labels(labelled, begins, stops)
    kept = learnt > 0
    begins, stops, owners, learnt = begins[kept], stops[kept], owners[kept], learnt[kept]
    held = stops - begins - ((begins > starts[owners]) & (policy == "split"))  # a shared token counts once
    used, whole = np.zeros(len(ends), bool), np.zeros(len(ends), bool)
    used[owners] = True
    whole[owners[stops - begins == (ends - starts)[owners]]] = True
    last = labelled[np.searchsorted(labelled, ends) - 1] if len(labelled) else ends
    closed = np.zeros(len(ends), bool)
    closed[owners[(begins < last[owners]) & (last[owners] < stops)]] = True
    some = labels > 0
    counts["labels"] += int(labels.sum())
    counts["cut"] += int((used & ~whole).sum())
    counts["pieces"] += int((~whole[owners]).sum())
    counts["dropped"] += int((some & ~used).sum())
    counts["without_labels"] += int((~some).sum())
    counts["tokens_lost"] += int((ends - starts).sum() - held.sum())
    counts["labels_lost"] += int(labels.sum() - learnt.sum())
    counts["eos_cut"] += int((used & ~closed).sum())
    return begins, stops, owners


def _labels(labelled: Numbers, starts: Numbers, ends: Numbers) -> Numbers:
    """How many labels each stretch teaches: its first token has none before it to predict it."""
    found: Numbers = np.searchsorted(labelled, ends) - np.searchsorted(labelled, starts + 1)
    return np.maximum(found, 0)


def _chunks(ends: Numbers) -> Iterator[tuple[int, Numbers, Numbers]]:
    """The number of the first sample, starts and ends, of some samples after the other."""
    first, before = 0, 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, before + CHUNK, side="right")))
        some = np.asarray(ends[first:last], dtype=np.int64)
        yield first, np.concatenate(([before], some[:-1])), some
        first, before = last, int(some[-1])
