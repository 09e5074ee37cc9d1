"""What a licence asks of who uses the data. Enters: the name that a record states. Leaves: its concerns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

NONCOMMERCIAL, SHARE_ALIKE, UNCLEAR = "non-commercial", "share-alike", "unclear"
_ASKS = {
    NONCOMMERCIAL: r"(?<![a-z])nc(?![a-z])|non[- ]?commercial|(?:research|academic)(?: use)? only|非商[业用]",
    SHARE_ALIKE: r"(?<![a-z])sa(?![a-z])|share[- ]?alike|(?<![a-z])[al]?gpl|gfdl|odbl|相同方式共享",
    UNCLEAR: r"^\W*$|^(?:other|none|n/a|null|custom)$|unclear|unknown|unspecified|(?:not|un)stated"
    r"|not stated|no licen[cs]e|未知|不明|未注明",
}
_PATTERNS = {concern: re.compile(pattern, re.IGNORECASE) for concern, pattern in _ASKS.items()}


class Concern(NamedTuple):
    """A licence that a person should look at; `records` is None where nobody counted them."""

    licence: str
    records: int | None
    asks: tuple[str, ...]

    def __str__(self) -> str:
        count = "an unknown number of" if self.records is None else f"{self.records:,}"
        return f"{count} records under {self.licence or 'unknown'} ({', '.join(self.asks)})"


def concerns(licence: str) -> tuple[str, ...]:
    """Non-commercial, share-alike, unclear: all that hold, none for a plain permissive licence."""
    return tuple(concern for concern, pattern in _PATTERNS.items() if pattern.search(licence.strip()))


def concerning(names: Iterable[str], counts: Mapping[str, int]) -> list[Concern]:
    """The licences among `names` that have concerns, by name, with the records counted under them."""
    return [Concern(n, counts.get(n), asks) for n in sorted(set(names)) if (asks := concerns(n))]


def affected(counts: Mapping[str, int], concern: str) -> int:
    """The records whose licence has this concern."""
    return sum(count for name, count in counts.items() if concern in concerns(name))
