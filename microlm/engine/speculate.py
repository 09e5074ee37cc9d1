"""Speculation without a second model: the tokens that followed the last few when they stood there before.

Prompt lookup decoding. Each drafted token costs a row of the step, so a draft is as long as it seems to pay.
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (3, 2)  # of the n-grams that are looked up, the surest first
_HOPE = 0.7  # share of drafted tokens that come true, before anything is known
_PULL = 0.2  # of one token's outcome on the share
_PATIENCE = 0.01  # of the way back to hope with each draft that was left out: later it is tried again


class Lookup:
    """Where each n-gram of one request's prompt and answer stood last, and how often drafts came true.

    `most` tokens are drafted at most; `price` is what a drafted token costs, in steps without a draft.
    """

    def __init__(self, prompt: Sequence[int], most: int, price: float) -> None:
        self._tokens = list(prompt)
        self._prompt = len(prompt)
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram → the place after it
        self._indexed = 0
        self._most, self._price = most, price
        self._share = dict.fromkeys(SIZES, _HOPE)
        self._size = SIZES[0]  # of the n-gram behind the last draft

    def draft(self, output: Sequence[int], room: int) -> tuple[int, ...]:
        """At most `room` tokens that may follow prompt + `output`; none where it would not pay."""
        self._tokens.extend(output[len(self._tokens) - self._prompt :])
        tokens, end = self._tokens, len(self._tokens)
        for stop in range(max(self._indexed, SIZES[-1]), end):
            for size in SIZES:
                if stop >= size:
                    self._follows[tuple(tokens[stop - size : stop])] = stop
        self._indexed = end
        for size in SIZES:
            place = self._follows.get(tuple(tokens[end - size :])) if end >= size else None
            if place is not None:
                self._size = size
                count = self._length(size, min(self._most, room))
                since = tokens[place : place + count]  # fewer where it repeats itself: then round and round
                return tuple((since * (count // len(since) + 1))[:count] if since else ())
        return ()

    def learn(self, drafted: int, taken: int) -> None:
        """How many tokens of the last draft came true."""
        share = self._share[self._size]
        for _ in range(taken):
            share += _PULL * (1.0 - share)
        if taken < drafted:
            share -= _PULL * share
        self._share[self._size] = share

    def _length(self, size: int, most: int) -> int:
        """The length that promises most tokens for its price; 0 where none is better than no draft."""
        share = self._share[size]
        best, length, gained, likely = 1.0, 0, 1.0, 1.0
        for count in range(1, most + 1):
            likely *= share
            gained += likely
            if (promised := gained / (1.0 + self._price * count)) > best:
                best, length = promised, count
        if not length:
            self._share[size] = share + _PATIENCE * (_HOPE - share)
        return length
