"""Who holds which page of the KV cache: reference counts, and what free pages still hold, by hash.

Enters: how many pages there are; leaves: page numbers. No tensors here.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from microlm.engine.cache.store import PAGE


class PagePool:
    """Pages 1 … pages-1 (page 0 takes padding). A page is held by one request or more, or free.

    A free page may keep its content, known by a digest of all tokens up to its end, until it is needed: the
    longest unused goes first.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages - 1
        self._holders = [0] * pages
        self._blank = list(range(pages - 1, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # free pages with content, the oldest first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._kept)

    def take(self, count: int) -> list[int] | None:
        """That many pages for one holder, or None when there are not so many."""
        if count > self.free:
            return None
        return [self._take_one() for _ in range(count)]

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The pages that hold the beginning of a chain of digests."""
        found = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for pages that `find` told."""
        for page in pages:
            if not self._holders[page]:
                del self._kept[page]
            self._holders[page] += 1

    def held_alone(self, pages: Iterable[int]) -> int:
        """How many of the pages are free: holding them takes so many off `free`."""
        return sum(not self._holders[page] for page in pages)

    def remember(self, page: int, digest: bytes) -> None:
        """A held page is full; a second page of equal content stays unknown."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder less for each; the last of them is taken again first, so that beginnings stay."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._digest_of:
                self._kept[page] = None
            else:
                self._blank.append(page)

    def forget(self, pages: Iterable[int]) -> None:
        """What the pages hold is not to be found any more."""
        for page in pages:
            digest = self._digest_of.pop(page, None)
            if digest is not None:
                del self._page_of[digest]
            if page in self._kept:
                del self._kept[page]
                self._blank.append(page)

    def forget_all(self) -> None:
        """No free page holds anything any more, and no held one will be found."""
        self.forget(list(self._digest_of))

    def _take_one(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self._holders[page] = 1
        return page


class Chain:
    """Digests of one growing sequence's full pages; each covers all tokens before it, and the adapter."""

    def __init__(self, adapter: str = "") -> None:
        self._last = hashlib.blake2b(adapter.encode(), digest_size=16).digest()
        self.digests: list[bytes] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Add the digest of the next page's tokens."""
        words = np.array(tokens, dtype=np.int64).tobytes()
        self._last = hashlib.blake2b(self._last + words, digest_size=16).digest()
        self.digests.append(self._last)

    def cover(self, prompt: Sequence[int], output: Sequence[int], length: int) -> None:
        """Digests of all pages that are full within the first `length` tokens of prompt + output."""
        while (first := len(self.digests) * PAGE) + PAGE <= length:
            self.extend(slice_of(prompt, output, first, first + PAGE))


def slice_of(prompt: Sequence[int], output: Sequence[int], start: int, stop: int) -> Sequence[int]:
    """Tokens start … stop-1 of prompt + output."""
    split = len(prompt)
    if stop <= split:
        return prompt[start:stop]
    if start >= split:
        return output[start - split : stop - split]
    return [*prompt[start:], *output[: stop - split]]


def pages_for(tokens: int) -> int:
    """How many pages so many tokens fill or begin."""
    return -(-tokens // PAGE)
