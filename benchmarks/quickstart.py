"""The quickstart in figures: seconds of each stage, memory, headline scores with 95 % intervals, goals.

Reads a finished run (--run, default runs/quickstart). --fresh runs the recipe anew in a temporary folder with
an empty compile cache and samples the memory of all its processes; --quick does so with recipes/tiny.yaml.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from parts import result_file

from microlm.core import artifact, runtime
from microlm.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
POLL_S = 0.25
PARITY = "logits_max_abs_difference"
PACKAGES = ("microlm", "torch", "transformers", "tokenizers", "llguidance", "numpy")
# row → (target, direction: what is better, where the target stands)
GOALS: dict[str, tuple[float, str, str]] = {
    "wall_s": (600, "min", "issue 2: ten minutes on 2 cores"),
    "stages_s": (600, "min", "issue 2: ten minutes on 2 cores"),
    "peak_rss_bytes": (3e9, "min", "issue 2: 3 GB, all processes together"),
    "question_exact": (0.75, "max", "issue 2: held-out questions about facts seen"),
    "extraction_f1": (0.50, "max", "issue 2: held-out entities and wordings, free decoding"),
    "extraction_f1_constrained": (0.50, "max", "issue 2: held-out entities and wordings, JSON schema"),
    "constrained_valid": (1.0, "max", "issue 2: parse and schema-valid with JSON schema"),
    "eos": (0.98, "max", "issue 2: 200 chats that stop before the cap"),
    PARITY: (1e-4, "min", "issue 2: transformers, on the exported directory"),
    "verify": (1.0, "max", "issue 2: smoke checks passed"),
}


class Measured(NamedTuple):
    """What only watching a run can tell; None where nobody watched."""

    wall_s: float | None = None
    peak_rss_bytes: float | None = None  # summed over processes, shared pages counted in each
    peak_pss_bytes: float | None = None  # the same with shared pages divided among their users


def main() -> None:
    """Read or make the run, print the JSON object."""
    options = parse_options()
    if options.fresh or options.quick:
        recipe = ROOT / "recipes" / ("tiny.yaml" if options.quick else "quickstart.yaml")
        with tempfile.TemporaryDirectory(prefix="microlm-bench-") as folder:
            measured = run_watched(recipe, Path(folder))
            result = describe(Path(folder) / "run", measured, is_tiny=options.quick)
    else:
        result = describe(options.run, Measured())
    result_file.write(result, options.out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a finished run to read")
    parser.add_argument("--fresh", action="store_true", help="run recipes/quickstart.yaml anew and watch it")
    parser.add_argument("--quick", action="store_true", help="run recipes/tiny.yaml anew and watch it")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    return parser.parse_args()


def run_watched(recipe: Path, folder: Path) -> Measured:
    """Run a recipe into `folder/run`, from an empty cache; its wall time and peak memory."""
    command = [sys.executable, "-m", "microlm", "run", str(recipe), f"output={folder / 'run'}"]
    cache = runtime.child_env({"MICROLM_CACHE": str(folder / "cache")})
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=cache, stdout=sys.stderr)
    peaks = {"rss": 0, "pss": 0}
    watcher = threading.Thread(target=watch, args=(process, peaks), daemon=True)
    watcher.start()
    code = process.wait()
    wall_s = time.monotonic() - started
    watcher.join()
    if code != 0:
        sys.exit(f"benchmarks/quickstart.py: 'microlm run {recipe.name}' failed with code {code}")
    return Measured(round(wall_s, 1), peaks["rss"] or None, peaks["pss"] or None)


def watch(process: subprocess.Popen[bytes], peaks: dict[str, int]) -> None:
    """Keep the highest sums of resident memory over a process and its descendants (Linux)."""
    while process.poll() is None:
        found = [memory_of(pid) for pid in descendants(process.pid)]
        for name, total in (("rss", sum(m[0] for m in found)), ("pss", sum(m[1] for m in found))):
            peaks[name] = max(peaks[name], total)
        time.sleep(POLL_S)


def descendants(root: int) -> set[int]:
    """A process and all it started, as /proc shows them now."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def memory_of(pid: int) -> tuple[int, int]:
    """(RSS, PSS) of a process in bytes; zeros when it has ended."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    shared_out = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return resident * os.sysconf("SC_PAGE_SIZE"), shared_out


def describe(run: Path, measured: Measured, is_tiny: bool = False) -> dict[str, Any]:
    """The JSON object of a finished run; the tiny recipe has no goals."""
    stages = sorted(
        (artifact.open_artifact(str(path.parent)) for path in run.glob("*/manifest.json")),
        key=lambda stage: stage.manifest["times"]["finished"],
    )
    if not stages or stages[-1].kind != "report":
        hint = "make it with 'make quickstart', or use --fresh"
        sys.exit(f"benchmarks/quickstart.py: {run} holds no finished run; {hint}")
    rows = [*time_rows(stages, measured), *memory_rows(stages, measured), *model_rows(stages)]
    rows += score_rows(stages[-1])
    values = {row["name"]: row["value"] for row in rows}
    last = stages[-1].manifest
    instead = "stages_s" if values["wall_s"] is not None else "wall_s"  # one of the two stands for the time
    wanted = {name: goal for name, goal in GOALS.items() if name != instead}
    versions = {package: runtime.package_version(package) for package in PACKAGES}
    return {
        "schema_version": 1,
        "benchmark": "quickstart-tiny" if is_tiny else "quickstart",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": last["code"]["commit"],
        "machine": result_file.machine(last["environment"]),
        "versions": {"python": last["environment"]["python"], **versions},
        "rows": rows,
        "goals": [] if is_tiny else result_file.goals(wanted, values),
    }


def row(name: str, value: float | None, unit: str) -> dict[str, Any]:
    """One figure of one run."""
    runs = 0 if value is None else 1
    return {"name": name, "value": value, "unit": unit, "runs": runs, "min": value, "max": value}


def time_rows(stages: list[artifact.Artifact], measured: Measured) -> list[dict[str, Any]]:
    """Seconds of each stage, their sum, and the whole command from outside.

    A resumed stage knows only the seconds of its last attempt: its time, and so the sum, was not measured.
    """
    seconds: dict[str, float | None] = {}
    for stage in stages:
        times = stage.manifest["times"]
        seconds[Path(stage.url).name] = None if times.get("resumed") else round(times["seconds"], 2)
    known = [value for value in seconds.values() if value is not None]
    total = round(sum(known), 2) if len(known) == len(stages) else None
    rows = [row(f"stage_s.{name}", value, "s") for name, value in seconds.items()]
    return [*rows, row("stages_s", total, "s"), row("wall_s", measured.wall_s, "s")]


def memory_rows(stages: list[artifact.Artifact], measured: Measured) -> list[dict[str, Any]]:
    """Peaks over all processes when watched, and what training stages noted of their first process."""
    noted = {Path(s.url).name: s.manifest["metrics"].get("peak_rss_bytes") for s in stages}
    whole = [row(name, getattr(measured, name), "bytes") for name in ("peak_rss_bytes", "peak_pss_bytes")]
    return whole + [row(f"peak_rss_bytes.{name}", v, "bytes") for name, v in noted.items() if v is not None]


def model_rows(stages: list[artifact.Artifact]) -> list[dict[str, Any]]:
    """The model's size, the positions it was trained on, its distance from transformers."""
    metrics = [stage.manifest["metrics"] for stage in stages]
    tokens = sum(m.get("tokens", 0) for m in metrics if "parameters" in m)
    size = next((m["parameters"] for m in metrics if "parameters" in m), None)
    parity = next((m[PARITY] for m in metrics if PARITY in m), None)
    return [
        row("parameters", size, "parameters"),
        row("tokens", tokens, "tokens"),
        row(PARITY, parity, "logits"),
    ]


def score_rows(report: artifact.Artifact) -> list[dict[str, Any]]:
    """Each headline with the ends of its interval and its baselines."""
    rows = []
    for found in report.json("summary.json")["rows"]:
        name, unit = found["name"], found["unit"] or "share"
        beside = {"low95": found["low"], "high95": found["high"]}
        beside |= {key: found[key] for key in ("regex", "nearest_template") if found.get(key) is not None}
        rows.append(row(name, found["value"], unit))
        rows += [row(f"{name}.{key}", value, unit) for key, value in beside.items() if value is not None]
    return rows


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks/quickstart.py: {error}")
