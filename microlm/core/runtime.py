"""Device, dtype, seed, ranks, folders: the only reader of environment variables. torch is imported on use."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from types import FrameType

    import torch

Dtype = Literal["float32", "bfloat16"]


def env(name: str, default: str = "") -> str:
    """An environment variable; no other module reads them."""
    return os.environ.get(name, default)


def cache_dir() -> Path:
    """Where compiled kernels and fetched artifacts are kept (MICROLM_CACHE, else the user's cache)."""
    base = env("MICROLM_CACHE") or str(Path(env("XDG_CACHE_HOME") or Path.home() / ".cache") / "microlm")
    return Path(base)


def rank() -> int:
    """This process's rank, 0 when alone."""
    return int(env("RANK", "0"))


def world_size() -> int:
    """How many ranks work together, 1 when alone."""
    return int(env("WORLD_SIZE", "1"))


def local_ranks(ranks: int) -> int:
    """How many of `ranks` share this machine: torchrun says it, else all of them."""
    return int(env("LOCAL_WORLD_SIZE") or ranks)


class Torchrun:
    """The ranks that torchrun started: rank 0 owns every stage's directory, the others follow it.

    All ranks walk through the same stages in the same order; `stage` counts them.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        meeting = dist.rendezvous("env://", timeout=timedelta(minutes=5))  # type: ignore[attr-defined]
        self.store, self.rank, self.size = next(meeting)
        self.stage = 0

    def say(self, word: str) -> None:
        """Rank 0 tells the others where it is in this stage: `launch` or `done`."""
        self.store.set(f"microlm/{self.stage}/{word}", "")

    def hear(self, *words: str) -> str:
        """Wait until rank 0 has said one of the words; torchrun ends us when rank 0 fails."""
        while True:
            for word in words:
                if self.store.check([f"microlm/{self.stage}/{word}"]):
                    return word
            time.sleep(0.05)

    def group_store(self) -> Any:
        """A store for the addresses of this stage's process group."""
        import torch.distributed as dist

        return dist.PrefixStore(f"microlm/{self.stage}/group", self.store)  # type: ignore[attr-defined]


@cache
def torchrun() -> Torchrun | None:
    """The ranks that torchrun started, None when this process is on its own."""
    return Torchrun() if world_size() > 1 and env("MASTER_ADDR") else None


def child_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment for a process that we start."""
    return {**os.environ, **(extra or {})}


def bare_env() -> dict[str, str]:
    """The environment for a process that must not see our secrets: what Python needs to start."""
    names = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG")
    return {name: os.environ[name] for name in names if name in os.environ}


def set_env(name: str, value: str) -> None:
    """Set a variable for libraries that read it at import (compile cache, thread counts)."""
    os.environ[name] = value


def is_ci() -> bool:
    """Whether a continuous-integration run asks for skips to be failures."""
    return env("CI").lower() in ("1", "true")


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for a named purpose: equal inputs, equal seed, on every machine."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *names: object) -> random.Random:
    """A random generator of one's own for a named purpose."""
    return random.Random(derive_seed(seed, *names))


def set_seed(seed: int) -> None:
    """Seed torch, numpy and Python's `random`."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    import torch

    return (
        torch.device("cuda", int(env("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


@cache
def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bf16 natively (AVX512-BF16 or AMX); training runs on it."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@cache
def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def torch_dtype(name: Dtype) -> torch.dtype:
    """The torch dtype of a recipe's word."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def missing_for_compile() -> str | None:
    """What torch.compile lacks here on a CPU: a C++ compiler or Python's headers; None when it can run."""
    if not any(shutil.which(name) for name in (env("CXX") or "g++", "clang++")):
        return "a C++ compiler (Debian: apt-get install g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers (Debian: apt-get install python3-dev)"
    return None


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that `kill -9` leaves no orphan rank."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before we could ask
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def interruptible() -> Iterator[None]:
    """A Ctrl-C in the block is never lost, but raised at its end if need be.

    Python drops what is raised in a callback from C: numba calls back to keep what it compiles.
    """
    interrupted = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else minds it
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt


def give_memory_back() -> None:
    """Have glibc return what is free now, and arrays over 1 MB whenever they are; by itself it keeps much."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-4, 65536)  # M_MMAP_MAX: `keep_memory` forbids such arrays
        libc.malloc_trim(0)


def keep_memory() -> None:
    """Have glibc keep what is free now for the next arrays: to ask for it anew costs time in every step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large arrays come from the heap …
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: … which does not shrink


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, not of the one that started it."""
    status = Path("/proc/self/status")  # rusage of Linux goes on from what the parent had
    if status.exists() and (found := re.search(rb"VmHWM:\s*(\d+)", status.read_bytes())):
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory_bytes() -> int:
    """Peak memory so far: of the GPU where there is one, else of this process."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes()


def package_version(name: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def code_commit() -> str | None:
    """The git commit of the checkout this package runs from, or None (installed from a wheel).

    `+dirty` is added when the package's files are not those of the commit.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "status", "--porcelain=v2", "--branch"]
    try:
        done = subprocess.run([*command, "--", "microlm"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    found = re.search(r"^# branch\.oid ([0-9a-f]+)$", done.stdout, re.MULTILINE)
    is_dirty = any(not line.startswith("#") for line in done.stdout.splitlines())
    return found[1] + ("+dirty" if is_dirty else "") if found else None


def environment(processes: int) -> dict[str, Any]:
    """What a manifest records about where a stage ran, and on how many processes."""
    device_name = "cpu"
    if "torch" in sys.modules:
        import torch

        device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "platform": platform.platform(),
        "device": device_name,
        "cpus": os.cpu_count(),
        "world": processes,
    }
