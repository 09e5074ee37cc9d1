"""How splits differ in form. Enters: counts of keys, topics and tasks by split. Leaves: names that one lacks.

A name is missing when it stands in a held-out split and not in training; when the other split has a similar
one that is new; or when at least five of the other's records should have it by its share, and none has.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

EXPECTED = 5
_ALIKE = 0.65


@dataclass(frozen=True)
class Drift:
    """A key, topic or task of one part that another lacks; `similar` is what it may be called there."""

    what: str
    name: str
    present: str
    records: int
    absent: str
    similar: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        hint = f"; '{self.similar}' there?" if self.similar else ""
        return f"{self.what} '{self.name}' of {self.present} ({self.records:,}) is not in {self.absent}{hint}"


def compare(what: str, parts: Mapping[str, tuple[int, Mapping[str, int]]]) -> list[Drift]:
    """Names that one part has and another lacks; parts: name → (records, name → records that have it).

    The part of training comes first in the mapping.
    """
    found: list[Drift] = []
    first = next(iter(parts), "")
    for (one, (records, names)), (other, (others, theirs)) in permutations(parts.items(), 2):
        if not records or not others:
            continue
        lacking = {n: count for n, count in names.items() if not theirs.get(n)}
        foreign = [n for n in theirs if not names.get(n)]
        for name, count in sorted(lacking.items()):
            similar = _similar(name, foreign, lacking)
            told = any((d.name, d.present, d.absent) == (similar, other, one) for d in found)
            if not told and (other == first or similar or count / records * others >= EXPECTED):
                found.append(Drift(what, name, one, count, other, similar))
    return found


def _similar(name: str, foreign: list[str], lacking: Mapping[str, int]) -> str | None:
    """What the name may be called in the other part: the most alike, or the only one that is new there."""
    close = difflib.get_close_matches(name, foreign, n=1, cutoff=_ALIKE)
    if close:
        return close[0]
    return foreign[0] if len(foreign) == len(lacking) == 1 else None
