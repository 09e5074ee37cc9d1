"""Which tokens there will be. Enters: what was learnt, counts. Leaves: merges of byte strings, in order."""

from __future__ import annotations

from dataclasses import dataclass

from microlm.text.bpe.learn.count import CODE_POINTS
from microlm.text.bpe.learn.initial import Ints
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
    """What was learnt from bytes."""
    tokens, merges = _tokens(rows, [bytes([byte]) for byte in BYTES])
    return Choice(tokens, merges, int(rows[-1, 2]) if len(rows) else 0)


def choose_aligned(rows: Ints, parts: list[Part], room: int) -> Choice:
    """The most frequent of `parts` and of what was learnt from characters, `room` of them.

    A character is spelled by merges that come first, so that what is merged later are whole characters. Of
    two as frequent the part comes first: what is made of it needs it.
    """
    words, merges = _tokens(rows, None)
    ranked = [(-part.count, 0, i) for i, part in enumerate(parts)]
    ranked += [(-count, 1, i) for i, count in enumerate(rows[:, 2].tolist())]
    taken = sorted(ranked)[:room]
    inside = [parts[i] for _, is_word, i in taken if not is_word]
    inside.sort(key=lambda part: 4 if part.is_whole else len(part.text))  # three bytes begin with two
    spelled = [part.text for part in inside]
    count = sum(is_word for _, is_word, _ in taken)
    return Choice(
        [*spelled, *words[:count]],
        [*((text[:-1], text[-1:]) for text in spelled), *merges[:count]],
        -taken[-1][0] if taken else 0,
    )


def _tokens(rows: Ints, symbols: list[bytes] | None) -> tuple[list[bytes], list[Merge]]:
    """What each row makes, and of what; symbols are code points if none are given."""
    base = CODE_POINTS if symbols is None else len(symbols)
    tokens: list[bytes] = []
    merges: list[Merge] = []

    def spelled(number: int) -> bytes:
        if number >= base:
            return tokens[number - base]
        return chr(number).encode() if symbols is None else symbols[number]

    for left, right, _ in rows.tolist():
        merges.append((spelled(left), spelled(right)))
        tokens.append(b"".join(merges[-1]))
    return tokens, merges
