"""GRPO on the quickstart's model: strict triple F1 before and after, the curve, and what live weights cost.

Reads a finished run of recipes/grpo.yaml (--run, default runs/grpo), or makes one (--fresh; the quickstart
must lie in runs/quickstart). F1 is on held-out records that both models answered: intervals resample
entities, the difference is paired. Then an engine's refresh from memory is timed against building one anew,
in turn, their answers being equal. --plot FILE.png draws the curve. --quick times the refresh alone, small.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from parts import result_file

from microlm.core import stats
from microlm.core.manifest import Artifact, open_artifact
from microlm.core.metrics import FILE, read_metrics
from microlm.core.records import Prediction, Sampling
from microlm.engine import Engine
from microlm.eval.predict import PREDICTIONS
from microlm.eval.score import Gold, Scored, by_entity, read_gold
from microlm.eval.scoring import gold_triples, score_extraction
from microlm.model import directory
from microlm.model.config import ModelConfig
from microlm.model.presets import PRESETS, Shape
from microlm.model.transformer import Decoder, initialise
from microlm.text.read import read_records
from microlm.text.sources import factbook

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("microlm", "torch", "numpy", "numba")
KINDS = ("mixed", "specific", "generic")
ORIGINS = {"real": factbook.REAL, "invented": factbook.INVENTED}
GROUPS = (*KINDS, *ORIGINS, "all")
GOALS: dict[str, result_file.Goal] = {
    f"f1_low_after_less_high_before.{kind}": (
        0.0,
        "max",
        f"issue 7: triple F1 rises ({kind}), intervals apart",
    )
    for kind in ("all", "invented")
}
Rows = list[dict[str, Any]]
Counted = tuple[int, int, int]


def main() -> None:
    """Read or make the run, time the refresh, print the JSON object."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.fresh:
        command = [sys.executable, "-m", "microlm", "run", str(ROOT / "recipes/grpo.yaml")]
        subprocess.run([*command, f"output={options.run}"], check=True, stdout=sys.stderr)
    rows: Rows = []
    if not options.quick:
        measure_f1(rows, options.run)
        measure_training(rows, open_artifact(str(options.run / "grpo")))
        if options.plot:
            draw(options.plot, read_metrics(options.run / "grpo/logs" / FILE), rows)
    measure_refresh(rows, options.quick)
    result = result_file.result("grpo", rows, GOALS, PACKAGES, options.quick, threads=options.threads)
    result_file.write(result, options.out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/grpo"), help="a run of recipes/grpo.yaml")
    parser.add_argument("--fresh", action="store_true", help="run the recipe first")
    parser.add_argument("--quick", action="store_true", help="only the refresh, on a small shape")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curve")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    return parser.parse_args()


def add(rows: Rows, name: str, unit: str, value: float, low: float, high: float, runs: int) -> None:
    """A row; low and high are the ends of an interval, or the least and the most of several runs."""
    figures = {"value": round(value, 6), "min": round(low, 6), "max": round(high, 6)}
    rows.append({"name": name, "unit": unit, "runs": runs, **figures})


def measure_f1(rows: Rows, run: Path) -> None:
    """Triple F1 of both models by kind of wording and by origin of the names, and the paired difference."""
    gold = read_gold(open_artifact(str(run / "data")))
    before, after = (scored(open_artifact(str(run / name)), gold) for name in ("before", "after"))
    for kind in GROUPS:
        one, two = (by_entity(part(found, kind)) for found in (before, after))
        for name, counts in (("before", one), ("after", two)):
            add(rows, f"extraction_f1.{kind}.{name}", "F1", *stats.micro_f1_ci(counts), len(counts))
        add(rows, f"extraction_f1.{kind}.difference", "F1", *stats.f1_difference_ci(two, one), len(one))
    ends = {row["name"]: (row["min"], row["max"]) for row in rows}
    for kind in ("all", "invented"):
        apart = ends[f"extraction_f1.{kind}.after"][0] - ends[f"extraction_f1.{kind}.before"][1]
        add(rows, f"f1_low_after_less_high_before.{kind}", "F1", apart, apart, apart, 1)


def part(items: Sequence[Scored], name: str) -> Sequence[Scored]:
    """The answers of a kind of wording, or about names of an origin."""
    if name in ORIGINS:
        return [s for s in items if s.source == ORIGINS[name]]
    return [s for s in items if s.kind == name] if name in KINDS else items


def scored(predictions: Artifact, gold: Gold) -> list[Scored]:
    """Matched, predicted and gold triples of every answer, with the entities that the record is about."""
    found = []
    for p in sorted(read_records(predictions.file(PREDICTIONS), Prediction), key=lambda p: p.id):
        record = gold.extraction[p.id]
        counts = score_extraction(record, p.output, p.finish_reason, gold.bounds).triples
        heads = tuple(dict.fromkeys(t.head for t in record.relation)) or (f"\0{record.id}",)
        sums = (counts.matched, counts.predicted, len(gold_triples(record)))
        found.append(Scored(record.kind, record.lang, heads, sums, record.source))
    return found


def measure_training(rows: Rows, model: Artifact) -> None:
    """Time, and the figures of the first and the last logged steps."""
    logged = read_metrics(model.path / "logs" / FILE)
    seconds = float(model.manifest["times"]["seconds"])
    add(rows, "grpo_s", "s", seconds, seconds, seconds, 1)
    for name in ("reward", "solved", "flat_groups", "entropy", "rollout_gap", "answer_tokens"):
        values = [r[name] for r in logged if name in r]
        add(rows, f"{name}.first", "", values[0], values[0], values[0], 1)
        add(rows, f"{name}.last", "", values[-1], min(values), max(values), len(values))
    held_out = [r["validation_reward"] for r in logged if "validation_reward" in r]
    add(rows, "validation_reward.first", "", held_out[0], held_out[0], held_out[0], 1)
    add(rows, "validation_reward.last", "", held_out[-1], min(held_out), max(held_out), len(held_out))
    shares = [r["data_wait_share"] for r in logged if "data_wait_share" in r]
    add(
        rows, "rollout_share", "of the time", statistics.median(shares), min(shares), max(shares), len(shares)
    )


def measure_refresh(rows: Rows, quick: bool) -> None:
    """Seconds to go on with changed weights: `refresh`, and a new engine, from memory and from files."""
    config = (
        Shape(128, 2, 4, 2, 32, 256, "qwen3").config(512, 256, 1e4)
        if quick
        else PRESETS["26m"].config(6400, 1024, 1e4)
    )
    rounds = 3 if quick else 7
    with tempfile.TemporaryDirectory(prefix="microlm-bench-") as name:
        folder = write_model(Path(name), config)
        for options in ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantize": "int8"}):
            time_refresh(rows, folder, options, rounds)


def write_model(folder: Path, config: ModelConfig) -> Path:
    """Random weights, and a tokenizer with as many words as the model has ids."""
    from tokenizers import Tokenizer, models

    from microlm.text.tokenizer import SPECIAL

    words = [*SPECIAL, *(f"w{i}" for i in range(config.vocab_size - len(SPECIAL)))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    inner.add_special_tokens(list(SPECIAL))
    decoder = Decoder(config, torch.bfloat16)
    initialise(decoder, torch.Generator().manual_seed(0), plain=True)
    directory.save(decoder, folder)
    inner.save(str(folder / "tokenizer.json"))
    return folder


def time_refresh(rows: Rows, folder: Path, options: dict[str, Any], rounds: int) -> None:
    """Each way in turn, round after round; what they answer is equal."""
    decoder = directory.load(folder, torch.bfloat16)
    engine = Engine(folder, decoder=decoder, max_seqs=64, max_seq_len=256, **options)
    asked = Sampling(max_tokens=8, ignore_eos=True)

    def refreshed() -> Engine:
        engine.refresh()
        return engine

    def anew() -> Engine:
        return Engine(folder, decoder=decoder, max_seqs=64, max_seq_len=256, **options)

    def from_files() -> Engine:
        directory.save(decoder, folder)
        return Engine(folder, max_seqs=64, max_seq_len=256, **options)

    ways: dict[str, Callable[[], Engine]] = {"refresh": refreshed, "anew": anew, "from_files": from_files}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        with torch.no_grad():
            for p in decoder.parameters():
                p.mul_(1 + 0.01 * (-1) ** number)
        said = []
        for name, way in ways.items():
            started = time.perf_counter()
            found = way()
            seconds[name].append(time.perf_counter() - started)
            said.append([c.token_ids for c in found.generate([[5, 6, 7]] * 2, asked)])
        if any(answers != said[0] for answers in said):
            sys.exit("benchmarks/grpo.py: a refreshed engine answers otherwise than a new one")
    kind = options.get("quantize", options["dtype"])
    for name, found_s in seconds.items():
        add(rows, f"{name}_s.{kind}", "s", statistics.median(found_s), min(found_s), max(found_s), rounds)


def draw(path: Path, logged: Sequence[dict[str, Any]], rows: Rows) -> None:
    """Rewards over the steps, sampled in training and greedy on held-out prompts; F1 before and after."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, label in (("reward", "training, sampled"), ("validation_reward", "held-out prompts, greedy")):
        points = [(r["step"], r[name]) for r in logged if name in r]
        left.plot([x for x, _ in points], [y for _, y in points], label=label, linewidth=1.6)
    left.set(xlabel="steps", ylabel="reward: triple F1 of an answer")
    left.grid(alpha=0.3)
    left.legend()
    known = {row["name"]: row for row in rows}
    for place, name in enumerate(("before", "after")):
        for at, kind in enumerate(GROUPS):
            row = known[f"extraction_f1.{kind}.{name}"]
            spread = [[row["value"] - row["min"]], [row["max"] - row["value"]]]
            style = {"color": f"C{place}", "label": name if at == 0 else None}
            right.errorbar([at + 0.2 * place], [row["value"]], yerr=spread, fmt="o", capsize=4, **style)
    right.set(xticks=[at + 0.1 for at in range(len(GROUPS))], ylabel="triple F1 on held-out records")
    right.set_xticklabels(GROUPS)
    right.grid(alpha=0.3)
    right.legend(loc="upper left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
