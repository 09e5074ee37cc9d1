"""Work shared out over processes. Enters: a picklable function, tasks. Leaves: its results, in order.

The results do not depend on the number of processes; a worker dies with its parent and leaves Ctrl-C to it.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from microlm.core import runtime
from microlm.core.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # tasks that wait for each process: more would only hold memory


class Pool:
    """`pool.map(function, tasks)` over `processes`; one process works in place."""

    def __init__(self, executor: ProcessPoolExecutor | None, processes: int) -> None:
        self._executor, self._processes = executor, processes

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """The results in the order of the tasks; few tasks are taken ahead of time."""
        if self._executor is None:
            yield from map(function, tasks)
            return
        waiting: deque[Future[R]] = deque()
        try:
            for task in tasks:
                waiting.append(self._executor.submit(function, task))
                if len(waiting) >= AHEAD * self._processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (is there enough memory?); run the same command again, with "
                "fewer parallel.processes"
            ) from None


@contextmanager
def open_pool(processes: int, warm: Callable[[], None]) -> Iterator[Pool]:
    """A pool that is gone when the block is left, however that comes.

    `warm` loads what workers need; they are forked behind it where no other thread can hold a lock, else
    each starts anew.
    """
    runtime.give_memory_back()
    if processes == 1:
        with runtime.interruptible():
            warm()
        yield Pool(None, 1)
        return
    may_fork = sys.platform == "linux" and threading.active_count() == 1
    if may_fork:
        with runtime.interruptible():
            warm()
    context = multiprocessing.get_context("fork" if may_fork else "spawn")
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_settle)
    try:
        with runtime.interruptible():
            executor.submit(int)  # all are forked now, before a progress bar has a thread
        yield Pool(executor, processes)
        executor.shutdown()
    except BaseException:
        for process in (executor._processes or {}).values():
            process.kill()
        executor.shutdown(wait=False, cancel_futures=True)
        raise


def _settle() -> None:
    runtime.die_with_parent()
    runtime.give_memory_back()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
