"""Where an answer stands in its grammar, and which ids may come next, computed while the model runs."""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections.abc import Sequence
from queue import SimpleQueue

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Flags = NDArray[np.bool_]
HAND_OVER_S = 100e-6
"""From so much work on the thread does it: waking it, and the core that it takes, cost as much."""
MAX_REASON = 300  # characters of a message of llguidance


class Matcher:
    """One answer's place in its grammar. Used by one thread at a time."""

    __slots__ = ("_vocab_size", "_words", "inner")

    def __init__(self, inner: llguidance.LLMatcher, words: llguidance.LLTokenizer, vocab_size: int) -> None:
        self.inner = inner
        self._words = words
        self._vocab_size = vocab_size

    def consume(self, token: int) -> bool:
        """Go on by a token; False where it is not allowed, and then `error` says why."""
        return bool(self.inner.consume_token(token))

    @property
    def stopped(self) -> bool:
        """Whether nothing can follow."""
        return bool(self.inner.is_stopped())

    @property
    def accepting(self) -> bool:
        """Whether the answer could end here: what is cut off elsewhere is broken."""
        return not self.inner.is_error() and bool(self.inner.is_accepting())

    @property
    def error(self) -> str:
        """Why no token is allowed any more; "" while all is well."""
        return reason_of(self.inner)

    def allowed(self) -> Flags:
        """Which ids may come next, [V]; none after an error."""
        return _flags([self.inner], self._vocab_size)[0]

    def accepts(self, text: str) -> bool:
        """Whether an answer that goes on by a text could end there; in words of ours, not in the model's."""
        # The ids of its tokenizer may be of another text: it may normalise, or add a space.
        other = self.copy()
        return all(map(other.consume, self._words.greedy_tokenize(text))) and other.accepting

    def copy(self) -> Matcher:
        """Another answer's matcher, at the same place."""
        return Matcher(self.inner.deep_copy(), self._words, self._vocab_size)


class Masks:
    """Which ids may come next for several answers: in the making from the start, whole after `wait`."""

    def __init__(self, matchers: Sequence[Matcher], worker: Worker) -> None:
        self._inner = [m.inner for m in matchers]
        self._worker = worker
        self._taken, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()
        self._flags: Flags | None = None
        self._fault: BaseException | None = None

    def compute(self) -> None:
        """Compute, unless another thread does so."""
        if not self._taken.acquire(blocking=False):
            return
        started = time.thread_time()
        try:
            self._flags = _flags(self._inner, self._worker.vocab_size)
        except BaseException as e:  # it belongs to the thread that waits
            self._fault = e
        self._worker.learn(len(self._inner), time.thread_time() - started)
        self._done.release()

    def wait(self) -> Tensor:
        """The masks, bool [n,V], in the order of the matchers; a row without any id is an error's."""
        self.compute()  # a thread that did not come to it yet is not waited for
        with self._done:
            if self._fault is not None:
                raise self._fault
            return torch.from_numpy(self._flags)


class Worker:
    """A thread that computes masks in the background; it ends when nobody holds this any more."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._mask_s = 0.0  # of one mask, lately
        self._queue: SimpleQueue[Masks | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._queue,), name="masks", daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def begin(self, matchers: Sequence[Matcher]) -> Masks:
        """Have the masks of matchers computed; a few quick ones are left to who waits for them."""
        masks = Masks(matchers, self)
        if self._mask_s * len(matchers) > HAND_OVER_S:
            self._queue.put(masks)
        return masks

    def learn(self, count: int, seconds: float) -> None:
        """What masks took: half of the memory is as old as eight steps."""
        if count:
            self._mask_s += (seconds / count - self._mask_s) / 12


def _work(queue: SimpleQueue[Masks | None]) -> None:
    while (masks := queue.get()) is not None:
        masks.compute()
        del masks  # it holds the Worker, whose end is this thread's


def _flags(matchers: Sequence[llguidance.LLMatcher], vocab_size: int) -> Flags:
    """[n,V]; the interpreter's lock is free while one is computed."""
    words = (vocab_size + 31) // 32
    bits = np.zeros((len(matchers), words), dtype=np.int32)
    for row, matcher in zip(bits, matchers, strict=True):
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, words * 4)
        if matcher.is_error():  # llguidance then allows the EOS: a broken answer would pass for a whole one
            row[:] = 0
    flags = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little", count=vocab_size)
    return flags.view(np.bool_)


def reason_of(matcher: llguidance.LLMatcher) -> str:
    """What is wrong with a matcher, in one line; "" if nothing is."""
    text = re.split(r"\n +\d+ \| ", matcher.get_error())[0].strip()  # after it the grammar is shown
    _, found, fault = text.partition("\nerror: ")
    line = f"pattern: {fault}" if found else text.split("\n")[0]
    return "nothing satisfies it" if line.startswith("NoExtension") else line[:MAX_REASON]
