"""Who runs: a queue of waiting requests, and the running ones in slots 0..n-1 without holes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from microlm.engine.request import Request


class Scheduler:
    """Admits waiting requests in order of arrival as soon as slots are free."""

    def __init__(self, max_seqs: int, max_prefill_tokens: int) -> None:
        self.max_seqs = max_seqs
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def admit(self) -> list[Request]:
        """Move a group into slots: bounded by free slots and padded prompt tokens (one always fits)."""
        group: list[Request] = []
        longest = 0
        while self.waiting and len(self.running) < self.max_seqs:
            longest = max(longest, len(self.waiting[0].prompt))
            if group and longest * (len(group) + 1) > self.max_prefill_tokens:
                break
            request = self.waiting.popleft()
            request.slot = len(self.running)
            self.running.append(request)
            group.append(request)
        return group

    def release(self, finished: Iterable[Request]) -> list[tuple[Request, int, int]]:
        """Take requests out of their slots; returns the moves (who, from, to) that close the holes."""
        moves: list[tuple[Request, int, int]] = []
        for request in sorted(finished, key=lambda r: -(r.slot if r.slot is not None else -1)):
            hole, last = request.slot, self.running.pop()
            assert hole is not None and last.slot is not None
            if last is not request:
                moves.append((last, last.slot, hole))
                self.running[hole], last.slot = last, hole
            request.slot = None
        return moves
