"""The tokenizer in figures: training and encoding, beside Hugging Face tokenizers, tiktoken and gigatoken.

Reads --data, a .zst file of real JSONL, and a larger corpus of its sentences recombined (--large-mb). Ids and
held-out texts are compared before anything is timed; each side runs in fresh processes, in turn. The peers
have a Python of their own (--peer-python). --quick takes the first 4 MB, and has no goals.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from parts import inputs, result_file
from parts.watched import watch

from microlm.core import artifact, runtime
from microlm.core.errors import UserError
from microlm.text.tokenizer import MARKS, SPECIAL, Tokenizer, reserved

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
MB = 1_000_000
VOCAB = 6400
RESERVED = 7
LIBRARIES = ("tokenizers", "tiktoken", "gigatoken")
PACKAGES = ("microlm", "numpy", "numba", "tokenizers")
# row → (target, direction: what is better, against)
GOALS: dict[str, result_file.Goal] = {
    "train_speedup": (7, "max", "issue 4: 20 MB, CPU time of HF ByteLevel over ours, start-up counted"),
    "train_speedup.alone": (8, "max", "issue 4: 20 MB, the same without start-up"),
    "train_memory_share": (0.5, "min", "issue 4: 20 MB, our peak memory over HF's"),
    "train_cpu_s.whole": (30, "min", "issue 4: 200 MB"),
    "train_peak_rss_bytes.whole": (1e9, "min", "issue 4: 200 MB, all processes together"),
    "train_wall_s.large": (240, "min", "issue 4: 1.6 GB on two idle cores"),
    "train_peak_rss_bytes.large": (2e9, "min", "issue 4: 1.6 GB, all processes together"),
    "compression": (0.995, "max", "issue 4: held-out bytes per token over those of HF whole-run training"),
    "speedup.tokenizers": (15, "max", "issue 4: encode, CPU seconds of HF encode_batch over ours"),
    "speedup.tiktoken": (5, "max", "issue 4: encode, CPU seconds of tiktoken over ours"),
    "speedup.gigatoken": (2, "max", "issue 4: encode, CPU seconds of gigatoken over ours"),
    "worst_s": (2, "min", "issue 4: 1 MB of one character, of spaces, of ^, of random Han"),
    "worst_ratio": (2.5, "min", "issue 4: 2 MB of the same over 1 MB"),
    "shards_mb_per_cpu_s": (25, "max", "issue 4: JSONL to shards, end to end"),
    "shards_speedup.large": (1.8, "max", "issue 4: 1.6 GB of JSONL to shards, two processes over one, wall"),
}


class Plan(NamedTuple):
    """How large the run is, in MB of JSONL."""

    train_mb: int
    whole_mb: int  # 0: all of the file
    large_mb: int  # 0: none
    encode_mb: int
    runs: int


class Cost(NamedTuple):
    """What a command cost, its children included."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    output: str


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

    def cost(self, name: str, found: list[Cost]) -> None:
        """The rows of a command that ran one or more times."""
        where = name.partition(".")
        label = f"{{}}{where[1]}{where[2]}"
        self.add(label.format(f"{where[0]}_wall_s"), [c.wall_s for c in found], "s")
        self.add(label.format(f"{where[0]}_cpu_s"), [c.cpu_s for c in found], "s")
        self.add(label.format(f"{where[0]}_peak_rss_bytes"), [c.peak_rss_bytes for c in found], "bytes")


def main() -> None:
    """Make the inputs, run what is asked, print the JSON object."""
    options = parse_options()
    require(options)
    large = options.large_mb
    if options.quick:
        plan = Plan(4, 8, 16 if large is None else large, 2, 1)
    else:
        plan = Plan(20, 0, 1600 if large is None else large, 20, options.runs)
    with tempfile.TemporaryDirectory(prefix="microlm-bench-") as folder:
        bench = Bench(Path(folder), options.peer_python, plan, [], {})
        environment = measure(bench, inputs.real_lines(options.data, plan.whole_mb * MB))
    values = {row["name"]: row["value"] for row in bench.rows}
    result = {
        "schema_version": 1,
        "benchmark": "tokenizer-quick" if options.quick else "tokenizer",
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
    parser.add_argument("--quick", action="store_true", help="the first MBs, one run of each, no goals")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "pretrain.jsonl.zst")
    parser.add_argument("--large-mb", type=int, help="size of the recombined corpus; 0: none")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side on the small inputs")
    parser.add_argument("--peer-python", type=Path, default=ROOT / "build" / "peers" / "bin" / "python")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    return parser.parse_args()


def require(options: argparse.Namespace) -> None:
    """A UserError when the data or the peers are missing."""
    if not options.data.is_file():
        raise UserError(f"{options.data}: no such file; name a .zst file of JSONL with --data")
    if not options.peer_python.is_file():
        raise UserError(f"{options.peer_python}: the peers are not installed; `make peers` installs them")


def measure(bench: Bench, lines: list[bytes]) -> dict[str, Any]:
    """All rows; a manifest of the run, for what machine it was."""
    head, held_out = split(lines, bench.plan)
    small = bench.work / "small"
    inputs.write_shards(head, small, 1 << 40)
    texts = bench.work / "texts.json"
    texts.write_text(json.dumps([json.loads(line)["text"] for line in held_out]), encoding="utf-8")
    training(bench, small, texts)
    encoding(bench, texts)
    whole = bench.work / "whole"
    raw = inputs.write_shards(lines, whole, 32 * MB)
    bench.add("raw_bytes.whole", [raw], "bytes")
    bench.cost("train.whole", [train(bench, whole, processes=2)])
    shards(bench, whole, raw, "")
    if bench.plan.large_mb:
        large = bench.work / "large"
        raw = inputs.write_shards(inputs.recombined(lines, bench.plan.large_mb * MB, seed=5), large, 64 * MB)
        bench.add("raw_bytes.large", [raw], "bytes")
        bench.cost("train.large", [train(bench, large, processes=2)])
        shards(bench, large, raw, ".large")
    return artifact.open_artifact(str(bench.work / "ours")).manifest


def split(lines: list[bytes], plan: Plan) -> tuple[list[bytes], list[bytes]]:
    """The first lines to train on, and the last ones to hold out and encode."""
    return first(lines, plan.train_mb * MB), first(lines[::-1], plan.encode_mb * MB)


def first(lines: list[bytes], size: int) -> list[bytes]:
    """The first lines, at most `size` bytes."""
    ends = itertools.accumulate(map(len, lines))
    return [line for line, end in zip(lines, ends, strict=True) if end <= size]


def training(bench: Bench, shards: Path, texts: Path) -> None:
    """Both trainers in turn on the same file; held-out bytes per token of what they made."""
    nothing = bench.work / "nothing"
    lines = (json.dumps({"text": f"第{n}行，一二三四五六七八九十。" * 30}) + "\n" for n in range(5))
    inputs.write_shards((line.encode() for line in lines), nothing, 1 << 40)
    raw = sum(path.stat().st_size for path in shards.glob("*.jsonl"))
    bench.add("raw_bytes", [raw], "bytes")
    bench.cost("compile", [train(bench, nothing, env={"NUMBA_CACHE_DIR": str(bench.work / "numba")})])
    train(bench, nothing)  # what is compiled is kept
    start = bench.add("startup_cpu_s", [train(bench, nothing).cpu_s for _ in range(2)], "s")
    start_hf = bench.add("startup_cpu_s.tokenizers", [train_hf(bench, nothing).cpu_s for _ in range(2)], "s")
    ours: list[Cost] = []
    theirs: list[Cost] = []
    for _ in range(bench.plan.runs):
        ours.append(train(bench, shards))
        theirs.append(train_hf(bench, shards))
    bench.cost("train", ours)
    bench.cost("train.tokenizers", theirs)
    cpu, cpu_hf = (statistics.median(c.cpu_s for c in found) for found in (ours, theirs))
    memory, memory_hf = (statistics.median(c.peak_rss_bytes for c in found) for found in (ours, theirs))
    bench.add("train_speedup", [cpu_hf / cpu], "times")
    bench.add("train_speedup.alone", [(cpu_hf - start_hf) / (cpu - start)], "times")
    bench.add("train_memory_share", [memory / memory_hf], "share")
    held_out = json.loads(texts.read_text(encoding="utf-8"))
    size = sum(len(text.encode()) for text in held_out)
    keep(bench)
    kinds = {"": Tokenizer.load(bench.work / "kept"), ".tokenizers": Tokenizer.load(bench.work / "hf")}
    fertility = {
        name: bench.add(f"bytes_per_token{name}", [size / len(t.encode_arrays(held_out)[0])], "bytes")
        for name, t in kinds.items()
    }
    bench.add("compression", [fertility[""] / fertility[".tokenizers"]], "share")


def encoding(bench: Bench, texts: Path) -> None:
    """The same texts by everyone, one thread each, in turn; an error if one id differs."""
    kept = bench.work / "kept"
    peers = [str(bench.peer), str(HERE / "peers" / "tokenizer_encode.py")]
    commands = {name: [*peers, name, str(kept / "tokenizer.json"), str(texts)] for name in LIBRARIES}
    commands[""] = [sys.executable, str(HERE / "parts" / "tokenizer_encode.py"), str(kept), str(texts)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(bench.plan.runs):
        for name, command in commands.items():
            found[name].append(json.loads(run(bench, command, library()).output.splitlines()[-1]))
    if len({(f["digest"], f["tokens"]) for several in found.values() for f in several}) > 1:
        sys.exit(f"benchmarks/tokenizer.py: the libraries give different ids: {found}")
    if any(f["backend"] != "compiled" for f in found[""]):
        sys.exit("benchmarks/tokenizer.py: our encoder was not the compiled one")
    size = sum(len(text.encode()) for text in json.loads(texts.read_text(encoding="utf-8")))
    bench.add("encode_bytes", [size], "bytes")
    median: Callable[[str], float] = lambda name: statistics.median(f["cpu_seconds"] for f in found[name])  # noqa: E731
    for name, several in found.items():
        label = f".{name}" if name else ""
        bench.add(f"encode_mb_per_cpu_s{label}", [size / MB / f["cpu_seconds"] for f in several], "MB/s")
        bench.versions.update(several[0].get("versions", {}))
    bench.add("worst_s", [f["worst_seconds"] for f in found[""]], "s")
    bench.add("worst_ratio", [f["worst_ratio"] for f in found[""]], "times")
    for name in LIBRARIES:
        bench.add(f"speedup.{name}", [median(name) / median("")], "times")


def shards(bench: Bench, folder: Path, raw: int, label: str) -> None:
    """JSONL → token set, by one process and by two."""
    from_one: list[Cost] = []
    from_two: list[Cost] = []
    for _ in range(bench.plan.runs):
        from_one.append(tokenize(bench, folder, 1))
        from_two.append(tokenize(bench, folder, 2))
    bench.cost(f"shards{label}", from_one)
    bench.cost(f"shards{label}.two", from_two)
    bench.add(f"shards_mb_per_cpu_s{label}", [raw / MB / c.cpu_s for c in from_one], "MB/s")
    walls = [statistics.median(c.wall_s for c in found) for found in (from_one, from_two)]
    bench.add(f"shards_speedup{label}", [walls[0] / walls[1]], "times")


def train(bench: Bench, folder: Path, processes: int = 1, env: dict[str, str] | None = None) -> Cost:
    """The stage `tokenizer`, anew; the artifact is in `ours`."""
    stage = {
        "stage": "tokenizer",
        "out": str(anew(bench.work / "ours")),
        "source": [f"jsonl:{path}" for path in sorted(folder.glob("*.jsonl"))],
        "vocab_size": VOCAB,
        "digits": "runs",
        "reserved": RESERVED,
        "parallel": {"processes": processes},
    }
    recipe = bench.work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(stage), encoding="utf-8")
    return run(bench, [sys.executable, "-m", "microlm", "run", str(recipe)], library(env))


def train_hf(bench: Bench, folder: Path) -> Cost:
    """Hugging Face's trainer, anew; the file is in `hf`, beside our configuration."""
    out = anew(bench.work / "hf")
    out.mkdir()
    special = ",".join([*SPECIAL, *MARKS, *reserved(RESERVED)])
    script = str(HERE / "peers" / "tokenizer_train.py")
    paths = map(str, sorted(folder.glob("*.jsonl")))
    found = run(bench, [str(bench.peer), script, str(out / "tokenizer.json"), str(VOCAB), special, *paths])
    bench.versions.update(json.loads(found.output.splitlines()[-1])["versions"])
    return found


def tokenize(bench: Bench, folder: Path, processes: int) -> Cost:
    """`microlm tokenizer encode` of files into a token set, anew."""
    command = [sys.executable, "-m", "microlm", "tokenizer", "encode", str(bench.work / "kept")]
    names = [f"jsonl:{path}" for path in sorted(folder.glob("*.jsonl"))]
    out = ["--out", str(anew(bench.work / "tokens")), "--processes", str(processes)]
    sources = [word for name in names for word in ("--source", name)]
    return run(bench, [*command, *sources, *out], library())


def keep(bench: Bench) -> None:
    """Keep the tokenizer of the last training: the next one replaces `ours`."""
    shutil.copytree(bench.work / "ours", anew(bench.work / "kept"))


def run(bench: Bench, command: list[str], env: dict[str, str] | None = None) -> Cost:
    """A command to its end; its CPU time is what the system counted for it and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = watch(command, ROOT, env or runtime.child_env({}), bench.work / "log")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(found.wall_s, cpu_s, found.peak_rss_bytes, found.output)


def library(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that imports this library."""
    return runtime.child_env({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(extra or {})})


def anew(folder: Path) -> Path:
    """The folder, after what an earlier run left of it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks/tokenizer.py: {error}")
