"""Rows of a score: one figure with its interval; and bits per byte of documents, whole and by source."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from microlm.core import stats

ALL, OTHER = "all", "other sources"
_LEAST_DOCUMENTS = 5  # of a source that has a row of its own
_DIGITS = 6  # so that the last bits of another machine's sums do not show


@dataclass(frozen=True, slots=True)
class Row:
    """One score of `n` items, with its 95 % interval over `entities`: groups that share no entity.

    `by` is the model, or a baseline's name. An item that names no entity is a group of its own.
    """

    name: str
    kind: str
    lang: str
    value: float
    low: float
    high: float
    n: int
    entities: int
    unit: str
    by: str = "model"


def make_row(
    name: str, kind: str, lang: str, found: stats.Interval, sizes: tuple[int, int], unit: str
) -> Row:
    """A row of an estimate; `sizes` are items and groups."""
    value, low, high = (round(v, _DIGITS) for v in found)
    return Row(name, kind, lang, value, low, high, *sizes, unit)


def score_documents(path: Path) -> list[Row]:
    """Bits per byte of documents, all and by source: sum of bits / sum of bytes; none where none are told."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sizes = Counter(row["source"] for row in rows)
    pairs: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        source = row["source"] if sizes[row["source"]] >= _LEAST_DOCUMENTS else OTHER
        for group in (ALL, source) if len(sizes) > 1 else (ALL,):
            pairs.setdefault(group, []).append((row["bits"], row["bytes"]))
    return [
        make_row("bits_per_byte", group, ALL, stats.ratio_ci(found), (len(found), len(found)), "bits/byte")
        for group, found in sorted(pairs.items(), key=lambda pair: (pair[0] != ALL, pair[0]))
    ]
