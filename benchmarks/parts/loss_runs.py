"""Runs of the benchmark of losses: what differs between them, where they lie, a few at a time.

Every run is a pretrain stage with a directory of its own: finished ones are read, cut off ones go on.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from parts import inputs

from microlm.core import runtime
from microlm.core.artifact import LOGS
from microlm.core.errors import UserError
from microlm.core.manifest import open_artifact
from microlm.core.metrics import FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]
ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
WARMUP = 0.05  # of the steps

# the rates that are swept: the baseline's one rate; a factor on the three of ours
BASELINE, OURS = "adamw_cosine", "ours"
RATES: dict[str, tuple[float, ...]] = {
    BASELINE: (1e-3, 2e-3, 4e-3, 8e-3),
    OURS: (0.25, 0.5, 1.0, 2.0),
}


class Shape(NamedTuple):
    """What all runs have in common."""

    preset: str
    context: int
    batch_rows: int
    micro_rows: int
    validation_rows: int
    validations: int
    compile: bool


class Run(NamedTuple):
    """One run: its variant, rate, tokens and seed."""

    variant: str
    rate: float
    tokens: int
    seed: int

    @property
    def name(self) -> str:
        """The name of a stage, and of its folder."""
        rate = f"{self.rate:g}".replace(".", "_")
        return f"{self.variant}-{rate}-{self.tokens // 1000}k-seed{self.seed}"


class Result(NamedTuple):
    """What a finished run tells; the curve has tokens and bits per byte of held-out text."""

    bits_per_byte: float
    tokens_per_s: float
    epochs: float
    curve: list[tuple[float, float]]


def stage_of(run: Run, shape: Shape, shards: Path) -> dict[str, Any]:
    """The pretrain stage of a run. Model, data, their order, length and batch are those of every variant."""
    steps = run.tokens // (shape.batch_rows * shape.context)
    validations = max(1, min(shape.validations, run.tokens // 500_000))
    loop = {
        "tokens": run.tokens, "context": shape.context, "batch_rows": shape.batch_rows,
        "micro_rows": shape.micro_rows, "validation_rows": shape.validation_rows,
        "validation_steps": -(-steps // validations), "checkpoint_steps": max(50, steps // 20),
        "compile": shape.compile,
    }  # fmt: skip
    optim: dict[str, Any] = {"warmup_steps": max(1, round(WARMUP * steps))}
    if run.variant == BASELINE:
        optim |= {
            "matrices": "adamw", "schedule": "cosine", "adam_beta1": 0.9, "adam_beta2": 0.95,
            "adam_eps": 1e-8, "matrix_decay": 0.1, "table_decay": 0.1,
            "matrix_lr": run.rate, "embedding_lr": run.rate, "head_lr": run.rate,
        }  # fmt: skip
    else:
        optim |= {
            "schedule": "wsd", "stable_share": 0.3, "matrix_decay": 0.05,
            "matrix_lr": 0.02 * run.rate, "embedding_lr": 0.02 * run.rate, "head_lr": 0.004 * run.rate,
        }  # fmt: skip
    return {
        "stage": "pretrain", "name": run.name, "shards": str(shards.resolve()),
        "architecture": {"preset": shape.preset}, "loop": loop, "optim": optim,
        "init": "plain" if run.variant == BASELINE else "zero_outputs",
    }  # fmt: skip


def make_shards(work: Path, data: Path, megabytes: int) -> Path:
    """Token shards of the corpus's first `megabytes`, by the house's own stages; kept in `work`."""
    shards = work / f"data-{megabytes}" / "shards"
    if (shards / "manifest.json").is_file():
        return shards
    if not data.is_file():
        raise UserError(f"{data}: no such file; name a .zst file of JSONL with --data")
    work.mkdir(parents=True, exist_ok=True)
    raw = work / f"raw-{megabytes}.jsonl"
    raw.write_bytes(b"".join(inputs.real_lines(data, megabytes * 1_000_000)))
    stages = [
        {"stage": "data", "source": f"jsonl:{raw.resolve()}", "fill": "none"},
        {"stage": "tokenize", "name": "shards", "data": "data", "tokenizer": "builtin:zh-6400"},
    ]
    _microlm(work, f"data-{megabytes}", 0, stages)
    return shards


def execute(work: Path, shards: Path, shape: Shape, runs: Sequence[Run], jobs: int) -> dict[Run, Result]:
    """Bring every run to its end, `jobs` of them side by side, a core each; finished ones are read."""

    def one(run: Run) -> Result:
        out = work / "runs" / run.name
        if not (out / "manifest.json").is_file():
            started = time.perf_counter()
            _microlm(work, "runs", run.seed, [stage_of(run, shape, shards)])
            print(f"{run.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        return read(out)

    with ThreadPoolExecutor(jobs) as pool:
        asked = [pool.submit(one, run) for run in runs]
        try:
            return {run: future.result() for run, future in zip(runs, asked, strict=True)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those under way end or are interrupted with us
            raise


def read(out: Path) -> Result:
    """A finished run."""
    metrics: Mapping[str, Any] = open_artifact(str(out)).manifest["metrics"]
    rows = read_metrics(out / LOGS / FILE)
    curve = [(row["tokens"], row["bits_per_byte"]) for row in rows if "bits_per_byte" in row]
    epochs = max(metrics["epochs"].values())
    return Result(metrics["bits_per_byte"], metrics["tokens_per_s"], epochs, curve)


def _microlm(work: Path, output: str, seed: int, stages: list[dict[str, Any]]) -> None:
    """`microlm run` of some stages, in a process of its own on one core; its words go to a log beside it."""
    name = stages[-1]["name"]
    recipe, log = work / "recipes" / f"{name}.yaml", work / "recipes" / f"{name}.log"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "name": name, "output": str((work / output).resolve()), "seed": seed,
        "parallel": {"processes": 1, "threads": 1}, "stages": stages,
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(whole), encoding="utf-8")
    command = [sys.executable, "-m", "microlm", "run", str(recipe)]
    with log.open("wb") as words:
        done = subprocess.run(
            command, cwd=ROOT, env=runtime.child_env(ONE_CORE), stdout=words, stderr=words, check=False
        )
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-600:]
        raise UserError(f"{name}: ended with {done.returncode}; run the same command again to go on\n{tail}")
