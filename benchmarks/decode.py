"""Answers in figures: our engine, transformers and llama.cpp on the same 25.8M weights, in one run, in turn.

Prompts of 64 random ids and 128 new ones, one core at batch 1, two at 8 and 32; the time to a first token;
the cache against none (--plot draws it); shared prefixes; a constraint's cost; memory. First all must agree:
float32 ids with transformers, log-probabilities with a float32 pass over the same ids. --model, a trained
directory (SmolLM2, say), adds bits per byte by kind and drafts, which are null else. Wants xllamacpp and
gguf. --quick takes two layers and has no goals.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from parts import decode_features as features
from parts import decode_ways as ways
from parts import result_file
from parts.decode_inputs import config_of, prompts, write_gguf, write_model
from parts.decode_players import Player, huggingface, llamacpp, ours
from parts.result_file import Rows, add

from microlm.model import directory

PACKAGES = ("microlm", "torch", "transformers", "numba", "xllamacpp", "gguf")
PROMPT, NEW = 64, 128
NEAR = {"bf16": 0.02, "int8": 0.05, "int4": 1.0, "llama_bf16": 0.05, "llama_q8": 0.1, "llama_q4": 1.0}
"""Nats that a log-probability may be from the float32 pass; int4 of random weights is far from them."""
GOALS: dict[str, result_file.Goal] = {
    "over_hf.bf16": (4.0, "max", "issue 6: one core, batch 1, HF dynamic cache in bf16"),
    "over_hf.int8": (7.0, "max", "issue 6"),
    "over_hf.int4": (4.5, "max", "issue 6"),
    "over_llamacpp.bf16": (1.2, "max", "issue 6: same weights, threads and run"),
    "over_llamacpp.int8": (1.2, "max", "issue 6: against Q8_0"),
    "over_llamacpp.int4": (0.6, "max", "issue 6: against Q4_0"),
    "ttft_over_hf.512": (1.0, "min", "issue 6: ours over HF's"),
    "roofline_share.bf16": (0.75, "max", "issue 6: of what one core reads"),
    "over_hf.batch8": (1.5, "max", "issue 6: two cores, HF static batches"),
    "over_hf.batch32": (2.0, "max", "issue 6"),
    "cache_speedup_mean": (10.0, "max", "issue 6: the seeds' table; theirs 3.86"),
    "prefix_speedup": (5.0, "max", "issue 6: a shared system prompt of 400 tokens"),
    "constraint_cost": (0.10, "min", "issue 6: at batch 1"),
    "speculation_speedup": (1.5, "max", "issue 6: n-gram drafts, copying"),
    "bits_per_byte_lost.kv_int8": (0.001, "min", "issue 6"),
    "bits_per_byte_lost.kv_int4": (0.02, "min", "issue 6"),
    "kv_memory_share.int4": (0.30, "min", "issue 6: of bf16's"),
}


class Plan(NamedTuple):
    """Where the models lie, and how often each is timed."""

    model: Path
    files: dict[str, Path]
    rounds: int
    quick: bool


def main() -> None:
    """Measure and print."""
    options = parse_options()
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", config_of(options.quick))
        kinds = {"bf16": "BF16", "q8": "Q8_0", "q4": "Q4_0"}
        files = {n: write_gguf(model, Path(folder) / f"{n}.gguf", kind) for n, kind in kinds.items()}
        plan = Plan(model, files, 2 if options.quick else options.rounds, options.quick)
        torch.set_num_threads(1)
        measure_one(rows, plan)
        torch.set_num_threads(2)
        measure_batches(rows, plan)
        torch.set_num_threads(1)
        measure_features(rows, plan, options)
    result = result_file.result("decode", rows, GOALS, PACKAGES, options.quick)
    result_file.write(result, options.out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two layers, two rounds, no goals")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed")
    parser.add_argument("--model", type=Path, help="a trained model's directory: bits per byte, drafts")
    parser.add_argument("--plot", type=Path, help="draw the table of the cache to this file")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    return parser.parse_args()


def measure_one(rows: Rows, plan: Plan) -> None:
    """One core, one prompt: who agrees, then all in turn."""
    check_float32(rows, plan)
    players = [
        ours(plan.model, "bf16", 1),
        ours(plan.model, "int8", 1, quantize="int8"),
        ours(plan.model, "int4", 1, quantize="int4"),
        llamacpp(plan.files["bf16"], "llama_bf16", 1),
        llamacpp(plan.files["q8"], "llama_q8", 1),
        llamacpp(plan.files["q4"], "llama_q4", 1),
        huggingface(plan.model, "hf", torch.bfloat16),
    ]
    check_near(rows, plan, players)
    rates = race(rows, players, 1, plan.rounds, "1core")
    for name, theirs in (("bf16", "llama_bf16"), ("int8", "llama_q8"), ("int4", "llama_q4")):
        add(rows, f"over_hf.{name}", ratios(rates[name], rates["hf"]), "times")
        add(rows, f"over_llamacpp.{name}", ratios(rates[name], rates[theirs]), "times")
    first: dict[str, list[float]] = {player.name: [] for player in players}
    for number in range(plan.rounds):
        asked = prompts(1, 512, "ttft", number)
        for player in players:
            first[player.name].append(features.seconds(lambda p=player, a=asked: p.answer(a, 1)))
    for name, found in first.items():
        add(rows, f"ttft_s.{name}.512", found, "s")
    add(rows, "ttft_over_hf.512", ratios(first["bf16"], first["hf"]), "ours over HF's")
    measure_roofline(rows, plan, rates)


def measure_roofline(rows: Rows, plan: Plan, rates: dict[str, list[float]]) -> None:
    """What one core reads in a second, and the share of it that bf16 decoding comes to."""
    matrix, vector = torch.ones(16384, 4096), torch.ones(4096)
    read = [matrix.nbytes / features.seconds(lambda: torch.mv(matrix, vector)) for _ in range(40)]
    add(rows, "read_bytes_per_s", sorted(read)[-5:], "bytes/s, the five best of 40 products of 256 MiB")
    best = max(read)
    weights = directory.read_config(plan.model).parameters * 2
    add(
        rows,
        "roofline_share.bf16",
        [rate * weights / best for rate in rates["bf16"]],
        "share, prompt included",
    )


def measure_batches(rows: Rows, plan: Plan) -> None:
    """Two cores, 8 and 32 prompts at once."""
    players = [
        ours(plan.model, "bf16", 2),
        ours(plan.model, "int8", 2, quantize="int8"),
        huggingface(plan.model, "hf", torch.bfloat16),
        huggingface(plan.model, "hf_static", torch.bfloat16, static=True),
    ]
    for size in (8, 32):
        rates = race(rows, players, size, max(2, plan.rounds // 2), f"batch{size}")
        best = max(("hf", "hf_static"), key=lambda name: statistics.median(rates[name]))
        add(rows, f"over_hf.batch{size}", ratios(rates["bf16"], rates[best]), f"times, over {best}")


def measure_features(rows: Rows, plan: Plan, options: argparse.Namespace) -> None:
    """The cache, prefixes, constraints, memory; bits and drafts of a trained model."""

    def enter(name: str, values: list[float], unit: str) -> None:
        add(rows, name, values, unit)

    found = list(features.table(plan.model, plan.quick))
    for length, new, cached, anew in found:
        add(rows, f"cache_speedup.{length}+{new}", [anew / cached], "times")
    add(rows, "cache_speedup_mean", [statistics.mean(anew / cached for *_, cached, anew in found)], "times")
    if options.plot:
        features.plot(found, options.plot)
    features.prefix(plan.model, enter, plan.rounds)
    features.constraint(plan.model, enter, plan.rounds)
    features.memory(plan.model, enter)
    ways.invariant(plan.model, enter, plan.rounds)
    ways.cut_over(plan.model, enter, plan.rounds, ways.ROWS[:2] if plan.quick else ways.ROWS)
    if options.model:
        features.trained(options.model, enter, plan.rounds)


def check_float32(rows: Rows, plan: Plan) -> None:
    """Greedy ids of float32 must be those of transformers, alone and eight at once."""
    asked = prompts(8, PROMPT, "float32")
    mine = ours(plan.model, "float32", 1, dtype="float32")
    expected = huggingface(plan.model, "hf_float32", torch.float32).answer(asked, 32)
    for count in (1, 8):
        if mine.answer(asked[:count], 32) != expected[:count]:
            sys.exit("benchmarks/decode.py: float32 answers differ from those of transformers")
    add(rows, "equal_ids.float32", [8 * 32], "ids equal to transformers', alone and together")


def check_near(rows: Rows, plan: Plan, players: list[Player]) -> None:
    """What each says of its own answer, against a float32 pass over the same ids."""
    reference = directory.load(plan.model)
    for player in players:
        if player.judge is None:
            continue
        (prompt,) = prompts(1, PROMPT, "near")
        ids, told = player.judge(prompt, 32)
        with torch.inference_mode():
            scores = reference(torch.tensor([prompt + ids]))[0, PROMPT - 1 : -1].log_softmax(-1)
        exact = scores.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        worst = max(abs(a - b) for a, b in zip(told, exact, strict=True))
        add(rows, f"nats_off.{player.name}", [worst], "the worst of 32 tokens, from float32")
        if worst > NEAR[player.name]:
            sys.exit(f"benchmarks/decode.py: {player.name} computes something else: {worst:.3f} nats off")


def race(rows: Rows, players: list[Player], size: int, rounds: int, where: str) -> dict[str, list[float]]:
    """Tokens a second of each, in turn, on prompts that are new in each round; the first token counts."""
    rates: dict[str, list[float]] = {player.name: [] for player in players}
    for player in players:
        player.answer(prompts(size, PROMPT, where, "warm"), 4)
    for number in range(rounds):
        asked = prompts(size, PROMPT, where, number)
        for player in players:
            gc.collect()
            taken = features.seconds(lambda p=player, a=asked: p.answer(a, NEW))
            rates[player.name].append(size * NEW / taken)
    for name, found in rates.items():
        add(rows, f"tokens_per_s.{name}.{where}", found, "tokens/s, the prompt's time included")
    return rates


def ratios(mine: list[float], theirs: list[float]) -> list[float]:
    """One over the other, round by round."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]


if __name__ == "__main__":
    main()
