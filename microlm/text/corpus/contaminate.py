"""Held-out texts inside training documents. Enters: held-out texts. Leaves: which of them a document holds.

A text is known by its 64 smallest hashes of 13 tokens in a row (a fair sample of them, so memory is bounded);
a document that holds at least half of a text's sample is contaminated by it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microlm.text.compiled import njit
from microlm.text.corpus.store import save_array
from microlm.text.near.kernels import Hashes
from microlm.text.near.signature import grams

TOKENS = 13  # GPT-3's n-gram; a token is a Han character or a word, see `near.signature`
SAMPLE = 64
_SLOTS = 16  # bits of the filter before the table for each gram in it


@dataclass(frozen=True)
class HeldOut:
    """`grams` [G] sorted, the item of each, and how many each item has."""

    grams: Hashes
    items: NDArray[np.uint32]
    sizes: NDArray[np.uint32]
    filter: NDArray[np.uint8]
    overlap: float
    tests: int
    """So many items, the first ones, are tests, which no record may hold; the others are documents."""

    def found_in(self, text: str) -> int | None:
        """The item that a text holds, the one it holds most of; None if it holds none."""
        if not len(self.grams):
            return None
        known = _known(grams(text, TOKENS), self.filter, self.grams)
        if not len(known):
            return None
        item, share = _most_held(np.sort(known), self.grams, self.items, self.sizes)
        return item if share >= self.overlap else None


def gather(tests: Sequence[str], documents: Iterable[str], overlap: float) -> tuple[HeldOut, int]:
    """The held-out texts, numbered as they come, and how many are too short to have 13 tokens in a row."""
    samples: list[Hashes] = []
    short = 0
    for text in itertools.chain(tests, documents):
        sample = np.unique(grams(text, TOKENS))[:SAMPLE].copy()  # a view would hold all
        short += not len(sample)
        samples.append(sample)
    sizes = np.array([len(s) for s in samples], dtype=np.uint32)
    flat = np.concatenate(samples) if samples else np.zeros(0, dtype=np.uint64)
    del samples
    items = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
    order = np.argsort(flat, kind="stable")
    flat, items = flat[order], items[order]
    bits = np.zeros(1 << max(10, (_SLOTS * len(flat) // 8).bit_length()), dtype=np.uint8)
    _set(flat, bits)
    return HeldOut(flat, items, sizes, bits, overlap, len(tests)), short


@njit
def _set(hashes: Hashes, bits: NDArray[np.uint8]) -> None:
    """Set the bits that the hashes name."""
    mask = np.uint64(8 * len(bits) - 1)
    for value in hashes:
        slot = value & mask
        bits[slot >> np.uint64(3)] |= np.uint8(1 << (slot & np.uint64(7)))


@njit
def _known(hashes: Hashes, bits: NDArray[np.uint8], known: Hashes) -> NDArray[np.int64]:
    """Where in the sorted `known` the hashes begin that stand there; the filter spares most the search."""
    found = np.empty(len(hashes), dtype=np.int64)
    count = 0
    mask = np.uint64(8 * len(bits) - 1)
    for value in hashes:
        slot = value & mask
        if not (bits[slot >> np.uint64(3)] >> np.uint8(slot & np.uint64(7))) & 1:
            continue
        at = np.searchsorted(known, value)
        if at < len(known) and known[at] == value:
            found[count] = at
            count += 1
    return found[:count]


@njit
def _most_held(
    places: NDArray[np.int64], grams: Hashes, items: NDArray[np.uint32], sizes: NDArray[np.uint32]
) -> tuple[int, float]:
    """(item, share) of the item whose grams make up most of it, of those that begin at the sorted places."""
    held = np.empty(len(items), dtype=np.uint32)
    count = 0
    for i in range(len(places)):
        at = places[i]
        if i and places[i - 1] == at:
            continue
        value = grams[at]
        while at < len(grams) and grams[at] == value:
            held[count] = items[at]
            count += 1
            at += 1
    held = np.sort(held[:count])
    item, share = 0, 0.0
    start = 0
    for i in range(1, count + 1):
        if i == count or held[i] != held[start]:
            mine = (i - start) / sizes[held[start]]
            if mine > share:
                item, share = int(held[start]), mine
            start = i
    return item, share


def save(held_out: HeldOut, folder: Path) -> None:
    """Write it where worker processes find it."""
    for name in ("grams", "items", "sizes", "filter"):
        save_array(folder / f"held_out.{name}.npy", getattr(held_out, name))
    save_array(folder / "held_out.tests.npy", np.array([held_out.tests]))


def load(folder: Path, overlap: float) -> HeldOut:
    """What `save` wrote."""

    def column(name: str) -> NDArray[Any]:
        found: NDArray[Any] = np.load(folder / f"held_out.{name}.npy")
        return found

    arrays = (column("grams"), column("items"), column("sizes"), column("filter"))
    return HeldOut(*arrays, overlap, int(column("tests")[0]))
