"""What this device can do at most: a matrix product, timed once and kept in the cache."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import torch

from microlm.core import runtime, storage

_SECONDS = 1.0  # of timing; the best turn counts


def measured_peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the device's fastest matrix product in `dtype`, with as many threads as torch has now."""
    device = runtime.device()
    file = runtime.cache_dir() / "peaks.json"
    key = "|".join([device_name(device), str(dtype), f"{torch.get_num_threads()} threads", torch.__version__])
    known = _read(file)
    if key not in known:
        known[key] = _measure(device, dtype)
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(file, (json.dumps(known, indent=1) + "\n").encode())
    return known[key]


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's name, as its maker writes it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    threads = torch.get_num_threads()
    size = 8192 if device.type == "cuda" else 1024 if threads <= 4 else 4096
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    best, end, turns = float("inf"), time.perf_counter() + _SECONDS, 0
    while turns < 5 or time.perf_counter() < end:
        started = _clock(device, threads)
        torch.mm(left, right, out=out)
        best = min(best, _clock(device, threads) - started)
        turns += 1
    return 2 * size**3 / best


def _clock(device: torch.device, threads: int) -> float:
    """Seconds; on a CPU those in which its threads ran, so that others who use it do not count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() / threads


def _read(file: Path) -> dict[str, float]:
    """The figures of before; a file that is not ours is measured over."""
    try:
        data = json.loads(file.read_bytes())
        return {str(k): float(v) for k, v in data.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
