"""A run's rows → `loss.html`, a page without scripts or requests; `loss.png` where there is matplotlib."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microlm.core import storage
from microlm.core.report import Cell, Page, Point
from microlm.train.job import Job
from microlm.train.reporter.samples import read_samples

Rows = Sequence[Mapping[str, Any]]
PAGE, PICTURE = "loss.html", "loss.png"
X = "tokens seen"


def write_curves(job: Job, rows: Rows, summary: Mapping[str, Any]) -> None:
    """The page, and the picture of its first chart."""
    storage.write_atomic(job.logs / PAGE, page(job, rows, summary).html().encode())
    if importlib.util.find_spec("matplotlib"):
        with storage.explain_write(job.logs / PICTURE):
            _draw(job.logs / PICTURE, job.name, losses(rows))


def page(job: Job, rows: Rows, summary: Mapping[str, Any]) -> Page:
    """Figures, curves over the tokens seen, the samples."""
    loop = job.loop
    # of what was read, as a step of rollouts has as many rows as its answers fill
    rows_a_step = round(summary["tokens"] / (loop.steps * loop.context), 1)
    made = Page(
        f"Training: {job.name}",
        f"{loop.steps:,} steps of {rows_a_step:g} rows × {loop.context} tokens",
    )
    made.facts(facts(summary))
    made.heading("Loss")
    made.line_chart("Loss, nats per label", losses(rows), X, "loss")
    for title, name, label in (
        ("Bits per byte of held-out text", "bits_per_byte", "bits per byte"),
        ("Norm of the gradient, before clipping", "grad_norm", "norm"),
        ("Learning rate, share of the recipe's", "rate", "share"),
    ):
        if points := curve(rows, name):
            made.line_chart(title, {label: points}, X, label)
    for name in job.objective.metrics:
        found = {"training": curve(rows, name), "validation": curve(rows, f"validation_{name}")}
        title = name.replace("_", " ")
        made.line_chart(title.capitalize(), {k: points for k, points in found.items() if points}, X, title)
    made.heading("Speed")
    made.line_chart("Tokens per second", {"tokens/s": curve(rows, "tokens_per_s")}, X, "tokens/s")
    shares = {"MFU": curve(rows, "mfu"), "waiting for data": curve(rows, "data_wait_share")}
    made.line_chart("Shares: of the device's measured peak, of the time for data", shares, X, "share")
    _add_samples(made, job)
    return made


def facts(summary: Mapping[str, Any]) -> dict[str, Cell]:
    """The large figures above the curves."""

    def share(value: float | None) -> str | None:
        return None if value is None else f"{value:.1%}"

    memory = summary["peak_memory_bytes"]
    return {
        "parameters": summary["parameters"],
        "tokens seen": summary["tokens"],
        "training loss": summary["loss"],
        "validation loss": summary["validation_loss"],
        "bits per byte": summary["bits_per_byte"],
        "tokens per second": summary["tokens_per_s"],
        "share of peak (MFU)": share(summary["mfu"]),
        "waiting for data": share(summary["data_wait_share"]),
        "padding": share(summary["padding_share"]),
        "peak memory": None if memory is None else f"{memory / 1e9:.2f} GB",
    }


def losses(rows: Rows) -> dict[str, list[Point]]:
    """The curves of the first chart."""
    found = {"training": curve(rows, "loss"), "validation": curve(rows, "validation_loss")}
    return {name: points for name, points in found.items() if points}


def curve(rows: Rows, name: str) -> list[Point]:
    """(tokens, value) of every row that has a value."""
    return [(row["tokens"], row[name]) for row in rows if row.get(name) is not None]


def _add_samples(made: Page, job: Job) -> None:
    samples = read_samples(job.logs)
    if not samples:
        return
    made.heading("Samples")
    last = samples[-1]["step"]
    for step in sorted({row["step"] for row in samples}, reverse=True):
        block = made if step == last else Page("")
        table = [(row["prompt"], row["text"]) for row in samples if row["step"] == step]
        block.table(("prompt", "how it went on"), table, caption=f"after step {step:,}")
        if block is not made:
            made.details(f"after step {step:,}", block)


def _draw(path: Path, title: str, series: Mapping[str, Sequence[Point]]) -> None:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1.6)
    axes.set(title=f"Training: {title}", xlabel=X, ylabel="loss, nats per label")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
