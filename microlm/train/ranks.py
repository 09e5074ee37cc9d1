"""Several processes on one machine, or those that torchrun started: who we are, sums over all, clean ends.

The calling process is rank 0; the others die with it. Backend gloo on the CPU, nccl on CUDA.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.core.recipe import Parallel

TIMEOUT = timedelta(minutes=20)  # compiling on one rank may take minutes


class Ranks:
    """The group: `rank` of `size`, `sum_` in place over all."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as e:
                raise UserError(
                    f"a training process ended early ({str(e).splitlines()[0][:120]}); "
                    "run the same command again to continue from the last checkpoint"
                ) from e
        return tensor


def launch(parallel: Parallel, target: Callable[..., None], *args: Any) -> None:
    """Run `target(ranks, *args)` on every rank; the caller is rank 0 unless torchrun says otherwise."""
    if runtime.world_size() > 1:  # under torchrun
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        with _threads(parallel.threads), _group_end():
            target(Ranks(dist.get_rank(), dist.get_world_size()), *args)
        return
    size = parallel.processes
    with _threads(parallel.threads):
        if size == 1:
            target(Ranks(0, 1), *args)
            return
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=_worker, args=(rank, size, store.port, parallel.threads, target, args), daemon=True)
            for rank in range(1, size)
        ]
        for worker in workers:
            worker.start()
        try:
            _join_group(store, 0, size)
            with _group_end():
                target(Ranks(0, size), *args)
            for worker in workers:
                worker.join(timeout=60)
        finally:
            for worker in workers:
                worker.kill()


def _worker(rank: int, size: int, port: int, threads: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    runtime.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 hears Ctrl-C and tells everybody
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=TIMEOUT)
    _join_group(store, rank, size)
    with _threads(threads), _group_end():
        target(Ranks(rank, size), *args)


def _join_group(store: dist.Store, rank: int, size: int) -> None:
    runtime.set_env("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)


@contextmanager
def _group_end() -> Iterator[None]:
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
