"""Rows of metrics for wandb or trackio: both keep them on this machine unless their own settings say more."""

from __future__ import annotations

import contextlib
import importlib
import secrets
import sys
from pathlib import Path
from typing import Any

from microlm.core import runtime, storage
from microlm.train.job import Job

PROJECT = "microlm"
RUN = "tracker-run"


class Tracker:
    """One run of `loop.tracker`; what is logged after a resume goes on in the same run."""

    def __init__(self, job: Job) -> None:
        kind = job.loop.tracker
        self._package: Any = importlib.import_module(kind)
        name = _run_name(job)
        settings = {"loop": job.loop.model_dump(mode="json"), "optim": job.optim.model_dump(mode="json")}
        options = _wandb(self._package, job.logs, name) if kind == "wandb" else _TRACKIO
        self._wandb = job.logs / "wandb"
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the command's result
            self._package.init(project=PROJECT, name=name, config=settings, resume="allow", **options)

    def log(self, step: int, row: dict[str, float]) -> None:
        """Hand over a row."""
        self._package.log(row, step=step)

    def close(self) -> None:
        """Write what is left. wandb's links to files of this run would break when the folder is renamed."""
        with contextlib.redirect_stdout(sys.stderr):
            self._package.finish()
        for path in sorted(self._wandb.rglob("*")):
            if path.is_symlink():
                path.unlink()


_TRACKIO = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}


def _wandb(package: Any, logs: Path, name: str) -> dict[str, Any]:
    """Offline unless WANDB_MODE says otherwise; no console, code or machine statistics are taken."""
    settings = package.Settings(silent=True, console="off", save_code=False, x_disable_stats=True)
    mode = runtime.env("WANDB_MODE") or "offline"
    return {"dir": str(logs), "id": name, "mode": mode, "settings": settings}


def _run_name(job: Job) -> str:
    """A name of this run alone, kept beside its metrics."""
    path = job.logs / RUN
    if not path.exists():
        storage.write_atomic(path, f"{job.name}-{secrets.token_hex(4)}".encode())
    return path.read_text(encoding="utf-8")
