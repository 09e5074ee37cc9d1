"""Before a run: how long its samples are. After it: what its manifest tells of it, its curves as a page."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from microlm.core import runtime, storage
from microlm.core.metrics import FILE, read_metrics
from microlm.model.transformer import Decoder
from microlm.train.batches import PackedRows
from microlm.train.batches.lengths import sentences
from microlm.train.checkpoint import Position
from microlm.train.job import Job
from microlm.train.reporter.curves import write_curves
from microlm.train.reporter.speed import TIMED

SUMMARY = "summary.json"
LENGTHS = "lengths.json"


def tell_lengths(job: Job) -> None:
    """What is trained on, and what of it no row can hold: on stderr and in `lengths.json`, before a step."""
    rows = {"training": job.train, "validation": job.validation}
    sets = {split: some for split, some in rows.items() if isinstance(some, PackedRows)}
    told = {split: {n: asdict(found) for n, found in some.lengths.items()} for split, some in sets.items()}
    listed = {"context": job.loop.context, "too_long": sets["training"].too_long} | told
    job.logs.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(
        job.logs / LENGTHS, (json.dumps(listed, ensure_ascii=False, indent=1) + "\n").encode()
    )
    for split, some in sets.items():
        for line in sentences(some.lengths, some.context, some.too_long):
            sys.stderr.write(f"{job.name}: {split}: {line}\n")
        for name, found in some.left_out.items():
            sys.stderr.write(f"{job.name}: {split}: {name} is left out: {found.sentence()}\n")
    if job.validation is None and (job.loop.validation_rows or job.loop.keep_best):
        lost = ", and keep_best keeps nothing" if job.loop.keep_best else ""
        sys.stderr.write(
            f"{job.name}: warning: no held-out sample can be used, so there is no validation{lost}; hold "
            "some out in the data stage, or raise loop.context\n"
        )


def write_summary(job: Job, decoder: Decoder, at: Position) -> None:
    """Size, tokens, last losses, speed, what was left out: into `summary.json`; then the page."""
    rows = read_metrics(job.logs / FILE)
    summary = {
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "trained_parameters": sum(p.numel() for p in decoder.parameters() if p.requires_grad),
        "tokens": at.tokens,
        **job.train.told(at.data),
        "padding_share": at.data["padding"] / max(1, at.data["rows"] * job.loop.context),
        "loss": _last(rows, "loss"),
        "validation_loss": _last(rows, "validation_loss"),
        "bits_per_byte": _last(rows, "bits_per_byte"),
        **{name: _last(rows, name) for name in job.objective.metrics},
        **{name: _last(rows, name) for name in (f"validation_{m}" for m in job.objective.metrics)},
        **speed(rows),
        "nonfinite_steps": len(at.nonfinite),
        "batches_left_out": at.left_out,
        "allowed_mismatches": at.mismatches,
        "peak_rss_bytes": runtime.peak_rss_bytes(),
    }
    storage.write_atomic(job.logs / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    write_curves(job, rows, summary)


def speed(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Tokens/s, MFU and wait for data over all steps, from the rows that tell them; memory at its highest."""
    seconds, tokens, before = 0.0, 0.0, 0.0
    weighted = dict.fromkeys(("mfu", "data_wait_share"), 0.0)
    for row in rows:
        if row.get("tokens_per_s"):
            spent = (row["tokens"] - before) / row["tokens_per_s"]
            seconds, tokens = seconds + spent, tokens + row["tokens"] - before
            for name in weighted:
                weighted[name] += spent * row[name]
        before = row.get("tokens", before)
    if not seconds:
        return dict.fromkeys(TIMED)
    highest = max(row.get("peak_memory_bytes", 0.0) for row in rows)
    shares = {name: total / seconds for name, total in weighted.items()}
    return {"tokens_per_s": tokens / seconds, **shares, "peak_memory_bytes": highest}


def _last(rows: list[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if name in row), None)
