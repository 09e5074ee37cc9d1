"""How fast this device multiplies matrices at best: measured once for each dtype and number of threads."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from microlm.core import runtime, storage
from microlm.core.errors import UserError

if TYPE_CHECKING:
    import torch

FOLDER = "peak"
SECONDS = 0.3
TURNS = 5


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s (a multiply-add is two) of the fastest of some large products; kept in the cache folder."""
    told = _told(dtype)
    file = runtime.cache_dir() / FOLDER / (hashlib.sha256(told.encode()).hexdigest()[:16] + ".json")
    try:
        return float(json.loads(file.read_bytes())["flops"])
    except (OSError, ValueError, KeyError, TypeError):
        found = _measure(dtype)
    with suppress(UserError):  # a cache that cannot be written costs a second at the next start
        with storage.explain_write(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(file, json.dumps({"measured": told, "flops": found}).encode())
    return found


def _told(dtype: torch.dtype) -> str:
    """What the figure holds for."""
    import torch

    device = runtime.device()
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{runtime.cpu_name()} with {torch.get_num_threads()} threads"
    return f"{where}, {dtype}, torch {torch.__version__}"


def _measure(dtype: torch.dtype) -> float:
    import torch

    device = runtime.device()
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, started, turns = float("inf"), time.perf_counter(), 0
    with torch.no_grad():
        a @ b  # the first product of a shape chooses a kernel
        while turns < TURNS or time.perf_counter() - started < SECONDS:
            before = _clock(device)
            a @ b
            best = min(best, _clock(device) - before)
            turns += 1
    return 2 * size**3 / best


def _clock(device: torch.device) -> float:
    """Seconds of the device's work; on a CPU those of its threads, so that other programs do not count."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()
