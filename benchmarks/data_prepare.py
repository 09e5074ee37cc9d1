"""The data engine in figures, beside datatrove's MinHash pipeline and a plain datasketch script.

Reads --data, a .zst file of real Chinese JSONL, with duplicates planted in it, and a larger corpus of its
sentences recombined (--large-mb). Outputs are compared before anything is timed. The peers have a Python of
their own (--peer-python). --quick takes the first 10 MB, and has no goals.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from parts import inputs, result_file
from parts.watched import Watched, watch

from microlm.core import artifact, runtime
from microlm.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
PROCESSES = 2
MB = 1_000_000
PACKAGES = ("microlm", "numpy", "numba", "ftfy")
# row → (target, direction: what is better, against)
GOALS: dict[str, tuple[float, str, str]] = {
    "mb_per_s": (8, "max", "issue 3: raw Chinese JSONL on 2 cores, 0.2 GB"),
    "mb_per_s.large": (8, "max", "issue 3: raw Chinese JSONL on 2 cores, 1.6 GB"),
    "peak_rss_bytes": (1.5e9, "min", "issue 3: all processes together, 0.2 GB"),
    "peak_rss_bytes.large": (1.5e9, "min", "issue 3: all processes together, 1.6 GB"),
    "peak_rss_change": (0.10, "min", "issue 3: the same memory at 0.2 and 1.6 GB"),
    "speedup.datatrove": (3, "max", "issue 3: datatrove's MinHash pipeline, end to end, 2 workers each"),
    "speedup.datasketch": (
        10,
        "max",
        "issue 3: a plain datasketch script, deduplication alone, one core each",
    ),
    "exact_found": (1.0, "max", "issue 3: exact duplicates planted"),
    "near_found": (0.95, "max", "issue 3: near duplicates planted across the split, Jaccard .85 to .95"),
    "false_removals": (5, "min", "issue 3: of 10,000 unrelated real pairs"),
    "equal_digests": (1, "max", "issue 3: 1, 2 and 4 workers, shuffled shards"),
}


class Plan(NamedTuple):
    """How large the run is."""

    real_mb: int  # of the file that are read, 0: all
    large_mb: int
    equal_mb: int
    alone_mb: int
    planted: int
    pairs: int
    runs: int


class Bench(NamedTuple):
    """Where the run works, what it takes, and the rows so far."""

    work: Path
    peer: Path
    plan: Plan
    rows: list[dict[str, Any]]
    versions: dict[str, str]

    def add(self, name: str, values: Iterable[float | int], unit: str) -> float:
        """Enter the figure of one or more runs; their median."""
        found = list(values)
        value = statistics.median(found)
        kept = {"value": value, "unit": unit, "runs": len(found), "min": min(found), "max": max(found)}
        self.rows.append({"name": name, **kept})
        print(f"{name}: {value:g} {unit}", file=sys.stderr)
        return value


def main() -> None:
    """Make the inputs, run what is asked, print the JSON object."""
    options = parse_options()
    require(options)
    if options.quick:
        plan = Plan(10, 40 if options.large_mb is None else options.large_mb, 5, 3, 40, 200, 1)
    else:
        plan = Plan(0, 1600 if options.large_mb is None else options.large_mb, 40, 20, 100, 10_000, 2)
    if options.runs:
        plan = plan._replace(runs=options.runs)
    with tempfile.TemporaryDirectory(prefix="microlm-bench-") as folder:
        bench = Bench(Path(folder), options.peer_python, plan, [], {})
        lines = inputs.real_lines(options.data, plan.real_mb * MB)
        environment = measure(bench, lines)
    values = {row["name"]: row["value"] for row in bench.rows}
    result = {
        "schema_version": 1,
        "benchmark": "data_prepare-quick" if options.quick else "data_prepare",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": environment["code"]["commit"],
        "machine": result_file.machine(environment["environment"]),
        "versions": bench.versions | {name: runtime.package_version(name) for name in PACKAGES},
        "rows": bench.rows,
        "goals": [] if options.quick else result_file.goals(GOALS, values),
    }
    result_file.write(result, options.out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first 10 MB, one run of each, no goals")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "pretrain.jsonl.zst")
    parser.add_argument("--large-mb", type=int, help="size of the recombined corpus; 0: none")
    parser.add_argument("--runs", type=int, help="timed runs of each on the smaller corpus (default: 2)")
    parser.add_argument("--peer-python", type=Path, default=ROOT / "build" / "peers" / "bin" / "python")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    return parser.parse_args()


def require(options: argparse.Namespace) -> None:
    """A UserError when the data or the peers are missing."""
    if not options.data.is_file():
        raise UserError(f"{options.data}: no such file; name a .zst file of JSONL with --data")
    if not options.peer_python.is_file():
        venv = options.peer_python.parent.parent
        raise UserError(
            f"{options.peer_python}: the peers are not installed; make their environment: python3 -m venv"
            f" {venv} && {options.peer_python} -m pip install -r benchmarks/peers/requirements.txt"
        )


def measure(bench: Bench, lines: list[bytes]) -> dict[str, Any]:
    """All rows, equality first; a manifest of the run, for what machine it was."""
    plan = bench.plan
    equal_digests(bench, head(lines, plan.equal_mb * MB))
    start_up(bench, lines[:20])
    shards = bench.work / "planted"
    raw = inputs.write_shards(inputs.planted(lines, plan.planted, seed=0), shards, shard_size(lines))
    bench.add("raw_bytes", [raw], "bytes")
    small = end_to_end(bench, shards, raw)
    alone(bench, head(lines, plan.alone_mb * MB))
    false_removals(bench, lines)
    if plan.large_mb:
        large(bench, lines, small)
    return artifact.open_artifact(str(bench.work / "ours")).manifest


def equal_digests(bench: Bench, lines: list[bytes]) -> None:
    """The digest of the output for 1, 2 and 4 workers and for shuffled shards; an error if it differs."""
    there, shuffled = bench.work / "equal", bench.work / "shuffled"
    lines = inputs.planted(lines, max(5, bench.plan.planted // 10), seed=1)
    inputs.write_shards(lines, there, shard_size(lines))
    inputs.write_shards(inputs.shuffled(lines, seed=2), shuffled, shard_size(lines))
    found = set()
    for shards, processes in ((there, 1), (there, 2), (there, 4), (shuffled, 2)):
        ours(bench, shards, processes)
        found.add(artifact.open_artifact(str(bench.work / "ours")).digest)
    if len(found) > 1:
        sys.exit("benchmarks/data_prepare.py: workers or the order of the input change the output")
    bench.add("equal_digests", [1], "equal")


def start_up(bench: Bench, lines: list[bytes]) -> None:
    """Seconds of runs on next to nothing: with a full and with an empty cache of kernels; the peer."""
    shards = bench.work / "nothing"
    inputs.write_shards(lines, shards, MB)
    warm = bench.add("startup_s", [ours(bench, shards).wall_s], "s")
    empty = {"NUMBA_CACHE_DIR": str(bench.work / "numba")}
    bench.add("compile_s", [max(0.0, ours(bench, shards, env=empty).wall_s - warm)], "s")
    bench.add("startup_s.datatrove", [datatrove(bench, shards).wall_s], "s")


def end_to_end(bench: Bench, shards: Path, raw: int) -> list[Watched]:
    """Ours and datatrove's in turn on the planted corpus, and what each found."""
    runs: dict[str, list[Watched]] = {"": [], ".datatrove": [], ".datatrove_characters": []}
    kept: dict[str, list[str]] = {}
    for _ in range(bench.plan.runs):
        runs[""].append(ours(bench, shards))
        kept[""] = sources_of(bench.work / "ours" / "documents")
        for name, words in ((".datatrove", ()), (".datatrove_characters", ("--characters",))):
            runs[name].append(datatrove(bench, shards, *words))
            kept[name] = sources_of(bench.work / "datatrove" / "out")
    for name, found in runs.items():
        describe(bench, name, found, raw)
        for kind in ("exact", "near"):
            bench.add(f"{kind}_found{name}", [share_found(kept[name], kind, bench.plan.planted)], "share")
    walls = {name: statistics.median(w.wall_s for w in found) for name, found in runs.items()}
    for name in (".datatrove", ".datatrove_characters"):
        bench.add(f"speedup{name}", [walls[name] / walls[""]], "times")
    return runs[""]


def describe(bench: Bench, name: str, found: list[Watched], raw: int) -> None:
    """The rows of runs over an input of `raw` bytes."""
    bench.add(f"wall_s{name}", [w.wall_s for w in found], "s")
    bench.add(f"cpu_s{name}", [w.cpu_s for w in found], "s")
    bench.add(f"mb_per_s{name}", [raw / MB / w.wall_s for w in found], "MB/s")
    bench.add(f"peak_rss_bytes{name}", [w.peak_rss_bytes for w in found], "bytes")


def alone(bench: Bench, lines: list[bytes]) -> None:
    """Exact and near duplicates alone, one core each, in turn; texts that are clean already."""
    lines = inputs.planted(lines, bench.plan.planted, seed=3)
    records = [json.loads(line) for line in lines]
    path = bench.work / "texts.json"
    path.write_text(json.dumps([record["text"] for record in records]), encoding="utf-8")
    one_core = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    scripts = {
        "": [sys.executable, str(HERE / "parts" / "stage_dedup.py"), str(path)],
        ".datasketch": [str(bench.peer), str(HERE / "peers" / "datasketch_dedup.py"), str(path)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in scripts}
    for _ in range(bench.plan.runs):
        for name, command in scripts.items():
            found = json.loads(watch(command, ROOT, library(one_core), bench.work / "log").output)
            seconds[name].append(found["seconds"])
            bench.versions.update(found.get("versions", {}) if name else {})
            gone = set(found["removed"])
            kept = [record["source"] for number, record in enumerate(records) if number not in gone]
            if len(seconds[name]) == bench.plan.runs:
                bench.add(f"dedup_s{name}", seconds[name], "s")
                for kind in ("exact", "near"):
                    share = share_found(kept, kind, bench.plan.planted)
                    bench.add(f"dedup_{kind}_found{name}", [share], "share")
    median = statistics.median
    bench.add("speedup.datasketch", [median(seconds[".datasketch"]) / median(seconds[""])], "times")


def false_removals(bench: Bench, lines: list[bytes]) -> None:
    """Of unrelated real pairs: documents that go although none is as alike as the threshold asks for."""
    chosen = inputs.shuffled(lines, seed=4)[: 2 * bench.plan.pairs]
    texts = [json.loads(line)["text"] for line in chosen]
    path = bench.work / "texts.json"
    path.write_text(json.dumps(texts), encoding="utf-8")
    command = [sys.executable, str(HERE / "parts" / "stage_dedup.py"), str(path)]
    gone = json.loads(watch(command, ROOT, library(), bench.work / "log").output)["removed"]
    false = [n for n in gone if inputs.most_alike(texts, n) < 0.8]
    bench.add("unrelated_pairs", [len(texts) // 2], "pairs")
    bench.add("removals", [len(gone)], "documents")
    bench.add("false_removals", [len(false)], "documents")


def large(bench: Bench, lines: list[bytes], small: list[Watched]) -> None:
    """Speed and memory on the recombined corpus."""
    shards = bench.work / "large"
    size = bench.plan.large_mb * MB
    raw = inputs.write_shards(inputs.recombined(lines, size, seed=5), shards, 64 * MB)
    bench.add("raw_bytes.large", [raw], "bytes")
    found = ours(bench, shards)
    describe(bench, ".large", [found], raw)
    before = statistics.median(w.peak_rss_bytes for w in small)
    bench.add("peak_rss_change", [abs(found.peak_rss_bytes / before - 1)], "share")


def ours(
    bench: Bench, shards: Path, processes: int = PROCESSES, env: dict[str, str] | None = None
) -> Watched:
    """`microlm run` of the stage, anew, in a process of its own; the artifact is in `ours`."""
    out = bench.work / "ours"
    remove(out)
    names = [f"jsonl:{path}" for path in sorted(shards.glob("*.jsonl"))]
    stage = {
        "stage": "data",
        "out": str(out),
        "source": names,
        "fill": "none",
        "parallel": {"processes": processes},
    }
    recipe = bench.work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(stage), encoding="utf-8")
    command = [sys.executable, "-m", "microlm", "run", str(recipe)]
    return watch(command, ROOT, library(env), bench.work / "log")


def datatrove(bench: Bench, shards: Path, *words: str) -> Watched:
    """datatrove's pipeline, anew, in a process of its own; what it keeps is in `datatrove/out`."""
    out = bench.work / "datatrove"
    remove(out)
    script = HERE / "peers" / "datatrove_minhash.py"
    command = [str(bench.peer), str(script), str(shards), str(out), f"--workers={PROCESSES}", *words]
    found = watch(command, ROOT, runtime.child_env({"OMP_NUM_THREADS": "1"}), bench.work / "log")
    bench.versions.update(json.loads(found.output.splitlines()[-1])["versions"])
    return found


def library(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that imports this library."""
    return runtime.child_env({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(extra or {})})


def remove(folder: Path) -> None:
    """Delete a folder and what is left of it from a run before."""
    shutil.rmtree(folder, ignore_errors=True)


def head(lines: list[bytes], size: int) -> list[bytes]:
    """The first lines, about `size` bytes of them."""
    ends = itertools.accumulate(map(len, lines))
    return [line for line, end in zip(lines, ends, strict=True) if end <= size]


def shard_size(lines: list[bytes]) -> int:
    """So that there are about eight shards."""
    return max(1, sum(map(len, lines)) // 8)


def sources_of(folder: Path) -> list[str]:
    """The sources of all records below a folder, ours or datatrove's."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                record = json.loads(line)
                found.append(str(record.get("source") or record["metadata"]["source"]))
    return found


def share_found(kept: Iterable[str], kind: str, count: int) -> float:
    """The share of planted pairs of which at most one document was kept."""
    names = [name for name in kept if name.startswith(f"planted:{kind}:")]
    both = Counter(name.rpartition(":")[0] for name in names)
    return 1 - sum(number > 1 for number in both.values()) / count


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks/data_prepare.py: {error}")
