"""Several processes on one machine, or those that torchrun started: who we are, sums over all, clean ends.

The calling process is rank 0; the others die with it. What lies on GPUs, one for each rank, is summed by
NCCL, what lies on the host by gloo.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from microlm.core import runtime
from microlm.core.errors import CheckFailed, UserError
from microlm.core.recipe import Parallel

TIMEOUT = timedelta(minutes=20)  # compiling on one rank may take minutes
_AGAIN = "run the same command again to continue from the last checkpoint"
_STOPS = {signal.SIGINT, signal.SIGTERM}


class Stopped(Exception):
    """Somebody wants the run to stop: what is being made for this step is given up."""


class RankLost(UserError):
    """Another rank went away in the middle of a sum."""


class Interrupts:
    """Ctrl-C and SIGTERM from the start of `launch` on: a KeyboardInterrupt at once, or when `held` ends.

    Python drops an exception that is raised in a callback (of an import, say): every sum asks `check` again.
    """

    def __init__(self) -> None:
        self.hit = self.held = False

    def __call__(self, number: int, frame: object) -> None:
        """The signal handler."""
        self.hit = True
        self.check()

    def check(self) -> None:
        """KeyboardInterrupt when there was a signal and nothing holds it."""
        if self.hit and not self.held:
            raise KeyboardInterrupt


class Ranks:
    """The group: `rank` of `size`, `sum_` in place over all."""

    def __init__(
        self, rank: int, size: int, interrupts: Interrupts | None = None, store: Store | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self._interrupts, self._store = interrupts or Interrupts(), store

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place; RankLost when one of them is gone."""
        self._interrupts.check()
        if self.size > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as e:
                reason = str(e).partition("\n")[0][:120]
                raise RankLost(f"a training process ended early ({reason}); {_AGAIN}") from e
        return tensor

    def tell_stop(self) -> None:
        """Let all ranks know that they should stop soon."""
        if self._store is not None:
            self._store.set("stop", "")

    def told_stop(self) -> bool:
        """Whether one of them has said so; RankLost when rank 0, who keeps the store, is gone."""
        try:
            return self._store is not None and self._store.check(["stop"])
        except RuntimeError as e:
            raise RankLost(f"the first training process ended early; {_AGAIN}") from e

    def require_equal(self, number: int, what: str) -> None:
        """Refuse to go on when the ranks do not agree on a number."""
        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = number
        found = self.sum_(numbers).tolist()
        if len(set(found)) > 1:
            raise UserError(f"the training processes differ in {what}: {found}; let all see the same folder")


def launch(parallel: Parallel, target: Callable[..., None], *args: Any) -> bool:
    """Run `target(ranks, *args)` on every rank; True on rank 0, which owns the stage's directory.

    Under torchrun its ranks are taken, else `parallel.processes` are started, the caller being the first.
    """
    with _interrupts() as interrupts, limited_threads(parallel.threads):
        if group := runtime.torchrun():
            if group.rank == 0:
                group.say("launch")
            store = group.group_store()
            with _joined(store, group.rank, group.size):
                target(Ranks(group.rank, group.size, interrupts, store), *args)
            return group.rank == 0
        parallel = parallel.model_copy(update={"processes": processes(parallel)})
        if parallel.processes == 1:
            target(Ranks(0, 1, interrupts), *args)
        else:
            _spawn(parallel, interrupts, target, args)
        return True


def processes(parallel: Parallel) -> int:
    """How many ranks `launch` has."""
    if group := runtime.torchrun():
        return group.size
    gpus = torch.cuda.device_count()  # one for each rank
    return min(parallel.processes, gpus) if gpus else parallel.processes


def warn_idle(name: str, parallel: Parallel, batch_rows: int, micro_rows: int) -> None:
    """Say so when a step has fewer micro-batches than there are processes to take them."""
    size, pieces = processes(parallel), math.ceil(batch_rows / micro_rows)
    if size > pieces and runtime.rank() == 0:
        warnings.warn(
            f"{name}: {size} processes share {pieces} micro-batches a step ({batch_rows} rows in pieces of "
            f"{micro_rows}), so {size - pieces} wait; lower parallel.processes or loop.micro_rows",
            stacklevel=2,
        )


def _spawn(
    parallel: Parallel, interrupts: Interrupts, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    store = _open_store(parallel.processes)
    workers = _workers(store.port, parallel, target, args)
    try:
        _start(workers, interrupts)
        _await(store, workers, interrupts)
        _stay_here()
        with _joined(store, 0, parallel.processes):
            target(Ranks(0, parallel.processes, interrupts, store), *args)
        for worker in workers:
            worker.join(timeout=60)
    except RankLost as e:
        raise UserError(_last_words(store, workers)) from e
    finally:
        interrupts.held = True  # nobody is left behind
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()


def _open_store(size: int) -> TCPStore:
    """Where the ranks find each other: a port that only this machine can reach."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    fd = listener.detach()
    return TCPStore("127.0.0.1", port, size, True, TIMEOUT, wait_for_workers=False, master_listen_fd=fd)


def _workers(
    port: int, parallel: Parallel, target: Callable[..., None], args: tuple[Any, ...]
) -> list[SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    return [
        context.Process(target=_worker, args=(rank, port, parallel, target, args), daemon=True)
        for rank in range(1, parallel.processes)
    ]


def _start(workers: list[SpawnProcess], interrupts: Interrupts) -> None:
    """Start ranks 1, 2, …; a Ctrl-C meets them only when they are ready to leave it to rank 0.

    Another thread of ours may still take the signal while this one blocks it: it is held meanwhile.
    """
    resource_tracker.ensure_running()  # starting it would unblock the signals again
    interrupts.held = True
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        for worker in workers:
            worker.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        interrupts.held = False


def _await(store: Store, workers: list[SpawnProcess], interrupts: Interrupts) -> None:
    """Wait until every worker is there: joining the group would wait for one that has died."""
    while store.add("there", 0) < len(workers):
        interrupts.check()
        if not all(w.is_alive() for w in workers):
            raise UserError(_last_words(store, workers))
        time.sleep(0.02)


def _last_words(store: Store, workers: list[SpawnProcess]) -> str:
    """What is known about the end of the first worker that ended badly."""
    ended = wait([w.sentinel for w in workers], timeout=20)  # a killed process takes a while to be gone
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(5)  # its pipes close a moment before its exit code is there
    if store.check(["error"]):
        return str(store.get("error"), "utf-8")
    rank = next((i for i, w in enumerate(workers, 1) if w.exitcode), 0)
    code = workers[rank - 1].exitcode if rank else None
    if code is None:
        return f"a training process ended early; {_AGAIN}"
    if code < 0:
        name = signal.Signals(-code).name
        return f"training process {rank} was killed by {name} (is there enough memory?); {_AGAIN}"
    return f"training process {rank} ended with the error above; {_AGAIN}"


def _worker(
    rank: int, port: int, parallel: Parallel, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    runtime.die_with_parent()
    runtime.set_env("LOCAL_RANK", str(rank))  # its GPU, where there are some
    for number in _STOPS:  # rank 0 hears Ctrl-C and tells everybody
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    store = TCPStore("127.0.0.1", port, parallel.processes, is_master=False, timeout=TIMEOUT)
    store.add("there", 1)
    _stay_here()
    try:
        with limited_threads(parallel.threads), _joined(store, rank, parallel.processes):
            target(Ranks(rank, parallel.processes, store=store), *args)
    except (KeyboardInterrupt, RankLost):
        pass  # rank 0 knows: it told us, or it is the one that is gone
    except (UserError, CheckFailed) as e:
        with suppress(RuntimeError):  # rank 0 met the same and has left
            store.set("error", str(e))
        sys.exit(1)


@contextmanager
def _interrupts() -> Iterator[Interrupts]:
    interrupts = Interrupts()
    try:
        before = {s: signal.signal(s, interrupts) for s in _STOPS}
    except ValueError:  # not the main thread: nobody to interrupt
        before = {}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    interrupts.held = False
    interrupts.check()


@contextmanager
def _joined(store: Store, rank: int, size: int) -> Iterator[None]:
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(runtime.device())
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _stay_here() -> None:
    """Keep the sums on this machine, whatever name and networks it has."""
    runtime.set_env("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
