"""Threads that take part in compiled calls. Enters: a function of the thread's number."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

Work = Callable[[int, int, int], Any]
"""`(thread, calls before this one, address of (arrivals, given up))`."""
_PATIENCE_S = 2.0


class _Helpers:
    """What the helpers of one start share; between calls they know no team, so that it can be forgotten."""

    def __init__(self, count: int) -> None:
        self.sync = np.zeros(2, dtype=np.int64)
        self.gates = [threading.Lock() for _ in range(count)]
        self.threads: list[threading.Thread] = []
        self.works: list[Work | None] = [None] * count
        self.fault: BaseException | None = None
        self.calls = 0
        self.pid = os.getpid()
        for i, gate in enumerate(self.gates):
            gate.acquire()
            helper = threading.Thread(target=self._help, args=(i + 1,), name=f"microlm-{i + 1}", daemon=True)
            self.threads.append(helper)
            helper.start()

    def call(self, work: Work) -> None:
        """Thread 0's part, while the others do theirs; what one of them raised is raised here."""
        calls = self.calls
        self.calls += 1
        for i, gate in enumerate(self.gates):
            self.works[i] = work
            gate.release()
        work(0, calls, self.sync.ctypes.data)
        if self.fault is not None:
            raise self.fault

    def end(self) -> None:
        """Who waits in compiled code gives up; who sleeps ends. In a fork nobody is there."""
        if self.pid != os.getpid():
            return
        self.sync[1] = 1
        for gate in self.gates:
            with contextlib.suppress(RuntimeError):  # it is awake
                gate.release()
        for helper in self.threads:  # one that ran on while the interpreter ends would bring it down
            if helper is not threading.current_thread():  # whose call was the last to know of the team
                helper.join(_PATIENCE_S)

    def _help(self, thread: int) -> None:
        calls = 0
        while True:
            self.gates[thread - 1].acquire()
            work, self.works[thread - 1] = self.works[thread - 1], None
            if self.sync[1] or work is None:
                return
            try:
                work(thread, calls, self.sync.ctypes.data)
            except BaseException as e:  # the others would wait for us in compiled code for ever
                self.fault, self.sync[1] = e, 1
                return
            work, calls = None, calls + 1


class Team:
    """`threads` - 1 helpers that sleep between calls, and the caller as thread 0.

    Helpers are started at the first call, and again after a fork or an interrupted call.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helpers: _Helpers | None = None

    def run(self, work: Work) -> None:
        """`work` on every thread; returns when thread 0 has done its part, which should be the last."""
        helpers = self._helpers
        if helpers is None or helpers.pid != os.getpid():
            helpers = self._helpers = _Helpers(self.threads - 1)
            weakref.finalize(self, helpers.end)
        try:
            helpers.call(work)
        except BaseException:  # helpers may wait for us in compiled code, where we will never come
            helpers.end()
            self._helpers = None
            raise
