"""Who computes what in the next step: continuous batching over a bounded pool of pages.

Every step gives each decoding request its token; what is left of the step's tokens goes to prompts, in
pieces, so that a long prompt never stalls who is writing. When no page is left, the latest arrived request
gives its pages back and is computed again later.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from microlm.engine.cache.pages import PagePool, pages_for, slice_of
from microlm.engine.cache.store import PAGE
from microlm.engine.request import Request


class Work(NamedTuple):
    """A request's part of a step: tokens start … start+size-1 of what it has, then a draft of what may come.

    `last`: it reaches the request's last token, so that a new one is drawn.
    """

    request: Request
    start: int
    size: int
    last: bool
    draft: tuple[int, ...] = ()

    @property
    def wanted(self) -> int:
        """How many of the last tokens are scored: all of a prompt's whose log-probabilities are asked for."""
        request = self.request
        if request.sampling.prompt_logprobs is not None and self.start < len(request.prompt) - 1:
            return self.size + len(self.draft)
        return 1 + len(self.draft) if self.last else 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step: running requests, tokens, tokens of a prompt whose scores are kept, rows with drafts.

    `table` is the pages of the longest request.
    """

    max_seqs: int
    tokens: int
    scored: int
    draft_rows: int
    table: int


class Scheduler:
    """The waiting requests by arrival, the running ones by arrival, and their pages."""

    def __init__(self, pool: PagePool, limits: Limits, caching: bool) -> None:
        self.pool, self.limits = pool, limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.fresh: list[int] = []  # pages that were handed out and not cleared yet
        self.preemptions = 0
        self._caching = caching
        self._coming: dict[bytes, Request] = {}  # page digest → the running request that will fill it
        self._arrivals = 0
        self._scored = 0  # tokens of prompts that may still be scored in the step that is planned

    def add(self, request: Request) -> None:
        """Queue a request behind the others."""
        request.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(request)

    def plan(self) -> list[Work]:
        """The next step; the pages that it writes are held. Empty: nothing to do."""
        before = self.preemptions
        self._scored = self.limits.scored
        work = self._rows()
        left = self.limits.tokens - sum(1 + len(w.draft) for w in work)
        left = max(left, min(PAGE, self.limits.tokens))  # prompts always come forward
        for request in self.running:
            if left <= 0:
                return work
            if request.length - request.computed > 1:
                work.append(self._piece(request, left))
                left -= work[-1].size
        if self.waiting and self.preemptions == before:
            self._admit(work, left)
        return work

    def advance(self, work: list[Work]) -> None:
        """After the step: what was computed counts, full pages may be found, finished requests leave."""
        for request, start, size, last, _ in work:
            if not request.running:
                continue
            request.computed = max(start + size, request.length - 1) if last else start + size
            if request.finish_reason:
                self.release(request)
            elif self._caching and request.computed >= (request.full + 1) * PAGE:
                self._remember(request)

    def release(self, request: Request) -> None:
        """Take a running request out and its pages back; what an erroneous one left is not to be found."""
        if self._caching and request.finish_reason != "error":
            self._remember(request)
        self._leave(request)

    def preempt(self, request: Request) -> None:
        """Take a running request's pages back and let it begin again, before those that came later."""
        self.preemptions += 1
        self._leave(request)
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        if request.finish_reason == "error":
            self.pool.forget(request.pages)
        self.pool.give_back(request.pages)
        for digest in request.chain.digests[request.full :]:
            if self._coming.get(digest) is request:
                del self._coming[digest]
        self.running.remove(request)
        request.pages = []
        request.running, request.computed, request.full = False, 0, 0

    def _rows(self) -> list[Work]:
        """A row for every request that has one token to compute, and its draft."""
        work: list[Work] = []
        rows = sum(r.length - r.computed == 1 for r in self.running)
        spare = self.limits.draft_rows - rows
        for request in tuple(self.running):
            if not request.running or request.length - request.computed != 1:
                continue
            if not self._grow(request, request.length):
                continue
            draft = self._draft(request, spare) if request.lookup is not None and spare > 0 else ()
            spare -= len(draft)
            work.append(Work(request, request.computed, 1, True, draft))
        return work

    def _draft(self, request: Request, spare: int) -> tuple[int, ...]:
        """What may come, within its limit and, rather than by preempting another, within the free pages."""
        assert request.lookup is not None
        room = request.limit - len(request.output) - 1
        held = (len(request.pages) + self.pool.free) * PAGE - request.length
        draft = request.lookup.draft(request.output, min(spare, room, held))
        if draft:
            self._grow(request, request.length + len(draft))
        return draft

    def _piece(self, request: Request, left: int) -> Work:
        rest = request.length - request.computed
        size = min(rest, left)
        if request.sampling.prompt_logprobs is not None:
            size = max(1, min(size, self._scored))
            self._scored -= size
        return Work(request, request.computed, size, size == rest)

    def _admit(self, work: list[Work], left: int) -> None:
        """Let waiting requests in, in their order, while there are tokens, places and pages.

        One whose next page another request computes right now waits for it; who comes behind may overtake.
        """
        skipped: list[Request] = []
        for _ in range(min(len(self.waiting), 2 * self.limits.max_seqs)):
            if left <= 0 or len(self.running) >= self.limits.max_seqs:
                break
            request = self.waiting[0]
            found = self._found(request)
            if self._is_coming(request, len(found)):
                skipped.append(self.waiting.popleft())
                continue
            if not self._enter(request, found):
                break
            self.waiting.popleft()
            work.append(self._piece(request, left))
            left -= work[-1].size
        self.waiting.extendleft(reversed(skipped))

    def _found(self, request: Request) -> list[int]:
        """Pages in the cache that hold the request's beginning; its last token is always computed."""
        if not self._caching:
            return []
        request.chain.cover(request.prompt, request.output, request.length)
        if request.sampling.prompt_logprobs is not None:
            return []
        return self.pool.find(request.chain.digests[: (request.length - 1) // PAGE])

    def _is_coming(self, request: Request, found: int) -> bool:
        digests = request.chain.digests[: (request.length - 1) // PAGE]
        asks_all = request.sampling.prompt_logprobs is not None
        return not asks_all and found < len(digests) and digests[found] in self._coming

    def _enter(self, request: Request, found: list[int]) -> bool:
        """Hold pages for all of a request's tokens, if the running ones can then go on for a while."""
        need = pages_for(request.length) - len(found)
        spare = self.pool.free - self.pool.held_alone(found) - need
        if spare < 0 or (self.running and spare < len(self.running)):
            return False
        self.pool.hold(found)
        request.table = np.zeros(self.limits.table, dtype=np.int32)
        self._give(request, found)
        request.computed, request.full = len(found) * PAGE, len(found)
        if request.cached_tokens is None:
            request.cached_tokens = request.computed
        new = self.pool.take(need)
        assert new is not None
        self.fresh += new
        self._give(request, new)
        request.running = True
        insort(self.running, request, key=lambda r: r.arrival)
        for digest in request.chain.digests[len(found) :]:
            self._coming.setdefault(digest, request)
        return True

    def _grow(self, request: Request, tokens: int) -> bool:
        """Hold pages for so many tokens; False when the request itself had to give its pages back."""
        while (need := pages_for(tokens) - len(request.pages)) > 0:
            new = self.pool.take(need)
            if new is not None:
                self.fresh += new
                self._give(request, new)
                return True
            latest = self.running[-1]
            self.preempt(latest)
            if latest is request:
                return False
        return True

    def _give(self, request: Request, pages: list[int]) -> None:
        first = len(request.pages)
        request.table[first : first + len(pages)] = pages
        request.pages += pages

    def _remember(self, request: Request) -> None:
        """Pages that the request has filled may be found by others."""
        request.chain.cover(request.prompt, request.output, request.computed)
        for i in range(request.full, request.computed // PAGE):
            digest = request.chain.digests[i]
            self.pool.remember(request.pages[i], digest)
            if self._coming.get(digest) is request:
                del self._coming[digest]
            request.full = i + 1


def tokens_of(work: Work) -> list[int]:
    """The ids that a part of a step computes."""
    request, start, size, last, draft = work
    if size == 1 and last and request.output:
        return [request.output[-1], *draft]
    return [*slice_of(request.prompt, request.output, start, start + size), *draft]
