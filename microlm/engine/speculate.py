"""Speculation without a second model: the tokens that followed the last few when they stood there before.

Prompt lookup decoding. A draft costs a row of the step for each token, so drafting rests where it does not pay.
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (3, 2)  # of the n-grams that are looked up, the surest first
LONGEST_REST = 32  # tokens drawn without a draft, after drafts that failed in a row


class Lookup:
    """Where each n-gram of one request's prompt and answer stood last, and how well drafts went so far."""

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        self._tokens = list(prompt)
        self._prompt = len(prompt)
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram → the place after it
        self._indexed = 0
        self._most = self._width = most
        self._failed = self._rest = 0

    def draft(self, output: Sequence[int], room: int) -> tuple[int, ...]:
        """At most `room` tokens that may follow prompt + `output`; none where nothing is found or rests."""
        if self._rest:
            self._rest -= 1
            return ()
        self._tokens.extend(output[len(self._tokens) - self._prompt :])
        tokens, end = self._tokens, len(self._tokens)
        for stop in range(max(self._indexed, SIZES[-1]), end):
            for size in SIZES:
                if stop >= size:
                    self._follows[tuple(tokens[stop - size : stop])] = stop
        self._indexed = end
        count = min(self._width, room)
        if count < 1:
            return ()
        for size in SIZES:
            place = self._follows.get(tuple(tokens[end - size :])) if end >= size else None
            if place is not None:
                return tuple(tokens[place : place + count])
        return ()

    def learn(self, drafted: int, taken: int) -> None:
        """How many tokens of a draft came true."""
        if taken:
            self._failed = 0
            self._width = min(2 * self._width, self._most) if taken == drafted else taken + 1
            return
        self._failed += 1
        self._width = max(1, self._width // 2)
        self._rest = min(2**self._failed - 1, LONGEST_REST)
