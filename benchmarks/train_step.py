"""One training step, ours beside those that one would write otherwise: the same shape, weights and batch.

Peers: a plain step as a course teaches it (einsum, float32, full logits, a Python AdamW), and the Llama of
transformers in float32, under bf16 autocast, and that compiled; all with clipping and AdamW, in one process,
in turn. Three steps of each must give the same losses before anything is timed. On a GPU the share of the
peak of the 25.8M model comes beside them. --quick takes a smaller shape, and has no goals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parts import result_file
from parts.plain_step import PlainAdamW, PlainModel, cross_entropy
from parts.result_file import Rows, add
from parts.step_inputs import ADAMW, RATE, Step, batch_of, gpu_step, job_of, state_of
from torch.nn import functional as F

from microlm.core import runtime
from microlm.core.peak import peak_flops
from microlm.model.config import ModelConfig
from microlm.model.presets import PRESETS, Shape
from microlm.model.transformer import Decoder
from microlm.train import optim
from microlm.train.batches import Batch
from microlm.train.optim import OptimRecipe
from microlm.train.reporter.speed import position_flops

PACKAGES = ("microlm", "torch", "transformers")
PARITY_STEPS = 3
MICRO_ROWS = 2  # of ours: a setting that changes memory, and nothing of the result
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of a loss, in nats
GOALS: dict[str, result_file.Goal] = {
    "speedup.plain": (4.2, "max", "issue 5: the seed's step, re-stated"),
    "speedup.hf_float32": (2.8, "max", "issue 5: transformers' Llama, float32, AdamW"),
    "speedup.hf_autocast": (1.12, "max", "issue 5: the same under bf16 autocast (aim 1.2)"),
    "speedup.hf_compiled": (1.0, "max", "issue 5: the same, compiled"),
    "memory_share.plain": (0.37, "min", "issue 5: peak memory over that of the seed's step"),
}
GPU_GOALS: dict[str, result_file.Goal] = {
    "mfu.26m": (0.25, "max", "issue 5: 25.8M weights, 512 tokens of context, one GPU (aim 41 %)"),
}


class Plan(NamedTuple):
    """The shape, and how often it is timed."""

    config: ModelConfig
    rows: int
    context: int
    rounds: int


def main() -> None:
    """Measure and print."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    plan = plan_of(options)
    if options.memory_of:
        print(json.dumps({"peak": peak_of(options.memory_of, plan)}))
        return
    rows: Rows = []
    measure(rows, plan)
    measure_optimizers(rows, plan)
    if not options.quick or options.memory:
        measure_memory(rows, options)
    on_gpu = runtime.device().type == "cuda"
    if on_gpu:
        measure_gpu(rows, 10 if options.quick else 100)
    goals = GOALS | (GPU_GOALS if on_gpu else {})
    result = result_file.result("train_step", rows, goals, PACKAGES, options.quick, threads=options.threads)
    result_file.write(result, options.out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one layer, short rows, two rounds, no goals")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure memory with --quick too")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    parser.add_argument("--memory-of", metavar="VARIANT", help="make two steps here and print the peak")
    return parser.parse_args()


def plan_of(options: argparse.Namespace) -> Plan:
    """The shape of the first MicroLM: 31.5M weights, rows of 512 tokens, 8 of them."""
    rows, context, rounds = (2, 256, 2) if options.quick else (8, 512, options.rounds)
    config = PRESETS["31m"].config(6400, context, 1e4)
    if options.quick:
        config = Shape(256, 1, 4, 4, 64, 704, "llama").config(6400, context, 1e4)
    return Plan(config, rows, context, rounds)


def plain(plan: Plan, batch: Batch) -> Step:
    """The seed's step, re-stated."""
    device = runtime.device()
    model = PlainModel(plan.config, state_of(plan.config)).to(device)
    optimizer = PlainAdamW(model.parameters(), RATE, ADAMW["betas"])
    return _stepper(model, optimizer, lambda here: cross_entropy(model(here.input_ids), here.labels), batch)


def huggingface(plan: Plan, batch: Batch, autocast: bool, compiled: bool) -> Step:
    """transformers' Llama with its SDPA attention, and PyTorch's fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    device = runtime.device()
    fields = plan.config.to_hf("float32")
    model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="sdpa"))
    model.load_state_dict(state_of(plan.config))
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True, **ADAMW)
    called = torch.compile(model, dynamic=False) if compiled else model

    def loss_of(here: Batch) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = called(input_ids=here.input_ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), here.labels.flatten())

    return _stepper(model, optimizer, loss_of, batch)


def _stepper(
    model: torch.nn.Module, optimizer: Any, loss_of: Callable[[Batch], torch.Tensor], batch: Batch
) -> Step:
    here = batch.to(runtime.device())

    def step() -> float:
        loss = loss_of(here)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def ours(plan: Plan, batch: Batch, compiled: bool = True, matrices: str = "adamw") -> Step:
    """The loop's own step."""
    return job_of(plan.config, batch, micro_rows=MICRO_ROWS, compile=compiled, matrices=matrices)


VARIANTS: dict[str, Callable[[Plan, Batch], Step]] = {
    "plain": plain,
    "hf_float32": lambda plan, batch: huggingface(plan, batch, autocast=False, compiled=False),
    "hf_autocast": lambda plan, batch: huggingface(plan, batch, autocast=True, compiled=False),
    "hf_compiled": lambda plan, batch: huggingface(plan, batch, autocast=True, compiled=True),
    "ours": ours,
    "ours_eager": lambda plan, batch: ours(plan, batch, compiled=False),
}
FLOAT32 = ("plain", "hf_float32")


def measure(rows: Rows, plan: Plan) -> None:
    """Parity, then every variant's step in turn, round after round."""
    batch = batch_of(plan.config, plan.rows, plan.context)
    steps = {name: make(plan, batch) for name, make in VARIANTS.items()}
    check_parity(rows, steps)
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(plan.rounds):
        for name, step in steps.items():
            started, used = time.perf_counter(), time.process_time()
            step()
            cpu[name].append(time.process_time() - used)
            wall[name].append(time.perf_counter() - started)
    positions = plan.rows * plan.context
    decoder = Decoder(plan.config, torch.bfloat16)
    flops = positions * sum(position_flops(decoder, plan.context))
    peak = peak_flops(torch.bfloat16)
    add(rows, "peak_flops", [peak], "FLOP/s in bf16")
    clock = wall if runtime.device().type == "cuda" else cpu  # others use a CPU too: its seconds count
    for name, seconds in clock.items():
        add(rows, f"tokens_per_cpu_s.{name}", [positions / s for s in cpu[name]], "tokens/CPU s")
        add(rows, f"tokens_per_s.{name}", [positions / s for s in wall[name]], "tokens/s")
        add(rows, f"peak_share.{name}", [flops / s / peak for s in seconds], "share of the peak")
        if name != "ours":
            ratios = [theirs / own for theirs, own in zip(seconds, clock["ours"], strict=True)]
            add(rows, f"speedup.{name}", ratios, "times")


def check_parity(rows: Rows, steps: dict[str, Step]) -> None:
    """The losses of the first steps of all variants must agree; the first one compiles."""
    found: dict[str, list[float]] = {}
    for name, step in steps.items():
        started = time.perf_counter()
        found[name] = [step()]
        add(rows, f"first_step_s.{name}", [time.perf_counter() - started], "s, compiling included")
        found[name] += [step() for _ in range(PARITY_STEPS - 1)]
        add(rows, f"last_parity_loss.{name}", [found[name][-1]], "nats")
    for name, losses in found.items():
        tolerance = TOLERANCE["float32" if name in FLOAT32 else "bfloat16"]
        worst = max(abs(a - b) for a, b in zip(losses, found["hf_float32"], strict=True))
        add(rows, f"parity.{name}", [worst], "nats from hf_float32, the worst of 3 steps")
        if worst > tolerance:
            sys.exit(
                f"benchmarks/train_step.py: {name} computes other losses: {losses}, {found['hf_float32']}"
            )


def measure_optimizers(rows: Rows, plan: Plan) -> None:
    """CPU seconds of the optimizers alone, and how orthogonal the two Muons' steps are."""
    decoder = Decoder(plan.config, torch.bfloat16).to(runtime.device())
    decoder.load_state_dict(state_of(plan.config), strict=False)
    matrices = [p for n, p in decoder.named_parameters() if p.dim() == 2 and "layers" in n]
    generator = torch.Generator().manual_seed(0)
    for p in decoder.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device) * 1e-3
    made = {
        "adamw": optim.make(decoder, OptimRecipe(matrices="adamw")),
        "muon": optim.make(decoder, OptimRecipe()),
        "muon_alone": [optim.Muon(matrices, 1e-3, 0.95, dtype=torch.bfloat16)],
        "torch_muon_alone": [torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.0)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(plan.rounds + 1):
        for name, optimizers in made.items():
            used = _clock()
            for optimizer in optimizers:
                optimizer.step()
            if number:  # the first one makes the moments
                seconds[name].append(_clock() - used)
    for name, found in seconds.items():
        add(rows, f"optimizer_s.{name}", found, "s a step")
    for name in ("muon_alone", "torch_muon_alone"):
        worst, mean = singular_values(made[name][0], matrices)
        add(
            rows, f"singular_values_off.{name}", [mean], "mean distance of an update's singular values from 1"
        )
        add(rows, f"singular_values_worst.{name}", [worst], "the largest distance")


def singular_values(
    optimizer: torch.optim.Optimizer, matrices: list[torch.nn.Parameter]
) -> tuple[float, float]:
    """Largest and mean distance from 1 of the singular values of one matrix's update at a fresh gradient."""
    p = max(matrices, key=lambda m: max(m.shape) / min(m.shape))
    optimizer.state.clear()
    before, rate = p.detach().clone(), optimizer.param_groups[0]["lr"]
    optimizer.step()
    scale = rate * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
    off = (torch.linalg.svdvals((before - p.detach()).float() / scale) - 1).abs()
    return float(off.max()), float(off.mean())


def _clock() -> float:
    """Seconds of this process's work, or of the GPU's."""
    if runtime.device().type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure_memory(rows: Rows, options: argparse.Namespace) -> None:
    """The peak of a fresh process that makes two steps of a variant."""
    peaks = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--memory-of", name, f"--threads={options.threads}"]
        command += ["--quick"] if options.quick else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[name] = int(json.loads(done.stdout.splitlines()[-1])["peak"])
        add(rows, f"peak_memory_bytes.{name}", [peaks[name]], "bytes")
    for name in VARIANTS:
        if name != "ours":
            add(rows, f"memory_share.{name}", [peaks["ours"] / peaks[name]], "ours over theirs")


def peak_of(name: str, plan: Plan) -> int:
    """Two steps, and what they took at most."""
    step = VARIANTS[name](plan, batch_of(plan.config, plan.rows, plan.context))
    for _ in range(2):
        step()
    return runtime.peak_memory_bytes()


def measure_gpu(rows: Rows, steps: int) -> None:
    """Tokens a second and share of the peak of the 25.8M model, with documents and Muon, as a run has it."""
    step, flops, positions = gpu_step()
    for _ in range(5):
        step()
    used = _clock()
    for _ in range(steps):
        step()
    seconds = (_clock() - used) / steps
    add(rows, "tokens_per_s.26m", [positions / seconds], "tokens/s")
    add(rows, "mfu.26m", [flops / seconds / peak_flops(torch.bfloat16)], "share of the measured peak")


if __name__ == "__main__":
    main()
