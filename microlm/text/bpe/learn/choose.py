"""Which tokens there will be. Enters: what was learnt, counts. Leaves: merges of byte strings, in order."""

from __future__ import annotations

from dataclasses import dataclass

from microlm.text.bpe.learn.count import CODE_POINTS
from microlm.text.bpe.learn.lists import Ints
from microlm.text.bpe.learn.spelling import BYTES, Part

Merge = tuple[bytes, bytes]


@dataclass(frozen=True)
class Choice:
    """`tokens` beside the single bytes in the order of their ids, `merges` in the order of their ranks.

    `last_count` is how often the last one was seen that was taken, 0 if none was.
    """

    tokens: list[bytes]
    merges: list[Merge]
    last_count: int


def choose_exact(rows: Ints) -> Choice:
    """What was learnt from bytes, as `tokenizers` writes it down."""
    tokens, merges, counts = _tokens(rows, [bytes([b]) for b in BYTES])
    return Choice(list(dict.fromkeys(tokens)), _last(merges), min(counts, default=0))


def choose_aligned(rows: Ints, parts: list[Part], room: int) -> Choice:
    """The most frequent of `parts` and of what was learnt from characters, `room` of them.

    A character is spelled by merges that come first, so that what is merged later are whole characters.
    """
    tokens, merges, counts = _tokens(rows, None)
    begun: list[bytes] = []
    whole: list[bytes] = []
    words: dict[bytes, None] = {}
    taken, lowest, last = 0, counts[0] if counts else 0, 0

    def take(part: Part) -> None:
        (whole if part.is_whole else begun).append(part.text)

    rest = iter(parts)
    part = next(rest, None)
    for token, count in zip(tokens, counts, strict=True):
        lowest = min(lowest, count)  # a token that two merges give may bring a higher one back
        while part and part.count >= lowest and len(begun) + len(whole) + len(words) < room:
            take(part)
            last, part = part.count, next(rest, None)
        if len(begun) + len(whole) + len(words) == room:
            break
        words[token] = None
        last, taken = lowest, taken + 1
    while part and len(begun) + len(whole) + len(words) < room:
        take(part)
        last, part = part.count, next(rest, None)
    begun.sort(key=len)  # three bytes begin with two
    spelled = [(token[:-1], token[-1:]) for token in begun + whole]
    return Choice([*begun, *whole, *words], spelled + _last(merges[:taken]), last)


def _tokens(rows: Ints, symbols: list[bytes] | None) -> tuple[list[bytes], list[Merge], list[int]]:
    """What each row makes, of what, and how often it was seen; symbols are code points if none are given."""
    made: dict[int, bytes] = {}
    base = CODE_POINTS if symbols is None else len(symbols)

    def spelled(number: int) -> bytes:
        if number >= base:
            return made[number]
        return chr(number).encode() if symbols is None else symbols[number]

    tokens, merges, counts = [], [], []
    for left, right, count, new in rows.tolist():
        merges.append((spelled(left), spelled(right)))
        tokens.append(made.setdefault(new, b"".join(merges[-1])))
        counts.append(count)
    return tokens, merges, counts


def _last(merges: list[Merge]) -> list[Merge]:
    """Each merge where it stands last, as `tokenizers` ranks one that it learnt twice."""
    return list(dict.fromkeys(reversed(merges)))[::-1]
