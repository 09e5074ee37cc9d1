"""What an hour on this machine makes of real text: the curve, bits per byte by source, samples.

Runs recipes/hour.yaml on a .zst file of JSONL; what is finished is read, what was cut off goes on.
--plot FILE.png draws the curve and the sources. --quick runs the same stages on little text.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from parts import inputs, result_file

from microlm.core import runtime
from microlm.core.artifact import LOGS
from microlm.core.errors import UserError
from microlm.core.manifest import open_artifact
from microlm.core.metrics import FILE, read_metrics
from microlm.core.records import Sampling
from microlm.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("microlm", "torch", "numpy")
BEGINNINGS = ("李白", "北京是", "要安装这个软件，", "第一条　为了", "却说", "函数返回", "The ", "子曰：")
SAMPLING = Sampling(max_tokens=80, temperature=0.7, top_p=0.9, seed=1)
SMALL = (
    "pretrain.loop.tokens=60000", "pretrain.loop.context=128", "pretrain.loop.batch_rows=8",
    "pretrain.loop.compile=false", "pretrain.loop.validation_steps=20", "pretrain.loop.validation_rows=8",
    "predictions.limits.documents=20",
)  # fmt: skip


def main() -> None:
    """Train, read what came of it, print."""
    options = parse_options()
    work = options.work / ("quick" if options.quick else "full")
    text = write_text(options.data, work, 3_000_000 if options.quick else 0)
    words = [f"data.source=jsonl:{text}", f"output={work}", *(SMALL if options.quick else ())]
    command = [sys.executable, "-m", "microlm", "run", str(ROOT / "recipes/hour.yaml"), *words]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        raise UserError("the run ended early; the same command goes on with it")
    trained = open_artifact(str(work / "pretrain"))
    metrics: dict[str, Any] = trained.manifest["metrics"]
    rows = read_metrics(work / "pretrain" / LOGS / FILE)
    curve = [(row["tokens"], row["bits_per_byte"]) for row in rows if "bits_per_byte" in row]
    scores = json.loads((work / "scores" / "scores.json").read_text(encoding="utf-8"))["rows"]
    sources = {r["kind"]: r for r in scores if r["name"] == "bits_per_byte"}
    if options.plot:
        plot(curve, sources, options.plot)
    result = {
        "schema_version": 1,
        "benchmark": "train_hour-quick" if options.quick else "train_hour",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": runtime.code_commit(),
        "machine": result_file.machine(trained.manifest["environment"]),
        "versions": {name: runtime.package_version(name) for name in PACKAGES},
        "load": round(os.getloadavg()[0], 1),
        "rows": [
            figure("training_seconds", trained.manifest["times"]["seconds"], "s"),
            *(figure(name, metrics[name], unit) for name, unit in TOLD.items()),
            *(figure(f"bits_per_byte.{kind}", r["value"], "bits per byte") for kind, r in sources.items()),
        ],
        "goals": [],
        "curve": curve,
        "samples": samples(work / "pretrain"),
    }
    result_file.write(result, options.out)


TOLD = {
    "parameters": "weights", "tokens": "tokens", "tokens_per_s": "tokens/s", "bits_per_byte": "bits per byte",
}  # fmt: skip
"""Metrics of the training that are told, with their units."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same stages on little text")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "pretrain.jsonl.zst")
    parser.add_argument("--work", type=Path, default=Path("runs/train-hour"))
    parser.add_argument("--plot", type=Path, help="draw curve and sources into this file (needs matplotlib)")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    return parser.parse_args()


def write_text(data: Path, work: Path, limit: int) -> Path:
    """The corpus's first `limit` bytes (0: all) as plain JSONL in `work`."""
    text = work / "text.jsonl"
    if not text.is_file():
        if not data.is_file():
            raise UserError(f"{data}: no such file; name a .zst file of JSONL with --data")
        work.mkdir(parents=True, exist_ok=True)
        text.write_bytes(b"".join(inputs.real_lines(data, limit)))
    return text


def figure(name: str, value: float, unit: str) -> dict[str, Any]:
    """One row of the result."""
    return {"name": name, "value": value, "unit": unit}


def samples(model: Path) -> list[dict[str, str]]:
    """How the model goes on with each beginning."""
    found = Engine(model).generate(BEGINNINGS, SAMPLING)
    return [{"prompt": p, "text": c.text} for p, c in zip(BEGINNINGS, found, strict=True)]


def plot(curve: list[tuple[float, float]], sources: dict[str, dict[str, Any]], file: Path) -> None:
    """Bits per byte while it trained, and at the end by source with its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    left.plot([tokens / 1e6 for tokens, _ in curve], [bits for _, bits in curve], color="#2a6f97")
    left.set(xlabel="million tokens", ylabel="bits per byte of held-out text", ylim=(0, None))
    left.grid(alpha=0.3)
    ranked = sorted(sources.items(), key=lambda pair: pair[1]["value"], reverse=True)
    values = [r["value"] for _, r in ranked]
    errors = [[r["value"] - r["low"] for _, r in ranked], [r["high"] - r["value"] for _, r in ranked]]
    right.barh(
        [f"{kind} ({r['n']})" for kind, r in ranked], values, xerr=errors, color="#2a6f97", ecolor="#888"
    )
    right.set(xlabel="bits per byte (documents)")
    right.tick_params(axis="y", labelsize=7)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks/train_hour.py: {error}")
