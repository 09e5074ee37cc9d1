"""How the speed of training changes with the size of the model, the context and the rows: one picture.

Each point is the median of some real steps (compiled, bf16 where the device has it, documents kept apart,
AdamW) on random tokens. Batches are 2,048 tokens where the size or the context varies, so that only one thing
changes. --plot FILE.png draws the curves; --quick takes fewer and smaller points.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from parts import result_file
from parts.result_file import Rows, add
from parts.step_inputs import job_of, rows_of

from microlm.core import runtime
from microlm.core.peak import peak_flops
from microlm.model.config import ModelConfig
from microlm.model.presets import PRESETS, shape_of_size
from microlm.model.transformer import Decoder
from microlm.train.reporter.speed import position_flops

PACKAGES = ("microlm", "torch")
VOCABULARY, BATCH_TOKENS, CONTEXT, SIZE = 6400, 2048, 512, 26_000_000
SIZES = (4_000_000, 10_000_000, 26_000_000, 64_000_000, 110_000_000)
CONTEXTS = (128, 256, 512, 1024, 2048)
ROWS = (1, 2, 4, 8, 16)
STEPS = 3


class Point(NamedTuple):
    """A shape that is timed."""

    size: int
    context: int
    rows: int


def main() -> None:
    """Measure, draw, print."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    curves = curves_of(options.quick)
    found: dict[Point, tuple[float, float]] = {}
    rows: Rows = []
    for point in dict.fromkeys(p for points in curves.values() for p in points):
        found[point] = speeds, share = measure(point)
        name = f"{point.size / 1e6:g}m.context_{point.context}.rows_{point.rows}"
        add(rows, f"tokens_per_s.{name}", speeds, "tokens/s")
        add(rows, f"peak_share.{name}", [share], "share of the measured peak")
    result = result_file.result("train_scale", rows, {}, PACKAGES, options.quick, threads=options.threads)
    if options.plot:
        plot(curves, found, options.plot)
    result_file.write(result, options.out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, two points a curve")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (needs matplotlib)")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    return parser.parse_args()


def curves_of(quick: bool) -> dict[str, list[Point]]:
    """What varies along each axis of the picture."""
    sizes, contexts, rows = (SIZES[:2], CONTEXTS[:2], ROWS[:2]) if quick else (SIZES, CONTEXTS, ROWS)
    size, context = (sizes[0], contexts[-1]) if quick else (SIZE, CONTEXT)
    return {
        "weights": [Point(s, context, BATCH_TOKENS // context) for s in sizes],
        "tokens of context": [Point(size, c, BATCH_TOKENS // c) for c in contexts],
        "rows of a micro-batch": [Point(size, context, r) for r in rows],
    }


def config_of(size: int, context: int) -> ModelConfig:
    """A preset of about that size, or what the size dial makes of it."""
    presets = {round(s.parameters(VOCABULARY) / 1e6): s for s in PRESETS.values()}
    shape = presets.get(round(size / 1e6)) or shape_of_size(size, VOCABULARY, {})
    return shape.config(VOCABULARY, max(context, 512), 1e4)


def measure(point: Point) -> tuple[list[float], float]:
    """Tokens a second of each step (CPU seconds on a CPU), and the share of the device's peak."""
    config = config_of(point.size, point.context)
    stream = rows_of(config, point.context, documents=True, tokens=300_000).batches(point.rows)
    batch = next(stream)
    step = job_of(config, batch, documents=True, dtype="auto")
    step()
    seconds = []
    for _ in range(STEPS):
        started = clock()
        step()
        seconds.append(clock() - started)
    torch.compiler.reset()  # the next shape is another graph
    positions = batch.input_ids.numel()
    dtype = torch.bfloat16 if runtime.has_fast_bfloat16() or torch.cuda.is_available() else torch.float32
    flops = positions * sum(position_flops(Decoder(config), point.context))
    speed = [positions / s for s in seconds]
    return speed, flops / statistics.median(seconds) / peak_flops(dtype)


def clock() -> float:
    """Seconds: of a GPU's work, of this process's threads on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def plot(curves: dict[str, list[Point]], found: dict[Point, tuple[list[float], float]], file: Path) -> None:
    """Three panels of speeds, with each the share of the peak; only the first spans magnitudes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    varied = ("size", "context", "rows")
    for axis, (name, points), field in zip(axes, curves.items(), varied, strict=True):
        x = [getattr(p, field) for p in points]
        y = [statistics.median(found[p][0]) for p in points]
        axis.plot(x, y, marker="o", color="#2a6f97")
        for place, speed, point in zip(x, y, points, strict=True):
            told = f"{speed:,.0f}\n{found[point][1]:.0%}"
            axis.annotate(
                told, (place, speed), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8
            )
        log = field == "size"
        axis.set(xscale="log", yscale="log" if log else "linear", xlabel=name)
        axis.set(
            ylim=(min(y) * 0.7, max(y) * 2) if log else (0, max(y) * 1.25), xlim=(x[0] / 1.6, x[-1] * 1.6)
        )
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axis.set_xticks(x, [f"{v / 1e6:g}M" if log else str(v) for v in x])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens a second")
    figure.suptitle("Training speed on one core; below each speed the share of its peak in bf16")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
