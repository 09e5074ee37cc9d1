"""Speed of SFT on real conversations: useful tokens a second, ours beside plain transformers.

Peers: LlamaForCausalLM under bf16 autocast with SDPA and fused AdamW, on samples in random order padded to
the longest of the batch, on samples grouped by length, and on our own packed rows (position_ids, from which
transformers makes the block mask), plain and compiled. Useful are the positions of samples; padding is not.
The padded peers come in micro-batches of two sizes, and the quicker one counts. All see the same samples,
tokenized alike; three steps on one batch of them, packed and padded, must give equal losses before anything
is timed. Steps are timed in turn, batches included, after some that meet every shape there is to compile.
--quick takes a smaller shape, leaves out what compiles long, and has no goals.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parts import result_file
from parts.result_file import Rows, add
from parts.sft_inputs import Padded, numbers_of, padded, padded_batches, read_conversations
from parts.step_inputs import ADAMW, RATE, loop_step, state_of
from torch.nn import functional as F

from microlm.core import runtime
from microlm.model.config import ModelConfig
from microlm.model.presets import PRESETS, Shape
from microlm.text.shards import TokenSet
from microlm.train.batches import IGNORE, Batch, PackedRows
from microlm.train.job import LoopRecipe

PACKAGES = ("microlm", "torch", "transformers")
DATA = Path(__file__).parents[2] / "shared" / "data"
PARITY_STEPS, TOLERANCE = 3, 2e-2  # of a mean loss, in nats, in bf16
WARM_STEPS = 4
GOALS: dict[str, result_file.Goal] = {
    "speedup.hf_padded": (1.6, "max", "issue 7: transformers' Llama, padded to the longest, bf16 autocast"),
    "speedup.hf_packed": (1.1, "max", "issue 7: the same on packed rows"),
}


@dataclass(frozen=True)
class Plan:
    """The shape, the data, and how much of it is timed; `samples` make about as many positions as `rows`."""

    config: ModelConfig
    tokens: TokenSet
    context: int
    rows: int
    micro_rows: int
    samples: int
    rounds: int
    steps: int

    @property
    def packed(self) -> PackedRows:
        """Our rows."""
        return PackedRows({"talk": self.tokens}, {}, self.context, 0)


@dataclass(frozen=True)
class Player:
    """`step` of a batch of its kind gives the mean loss; `batches` are endless; `useful` positions of one."""

    step: Callable[[Any], float]
    batches: Iterator[Any]
    useful: Callable[[Any], int]
    held: Callable[[Any], int]


def main() -> None:
    """Measure and print."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    plan = plan_of(options)
    rows: Rows = []
    tell_data(rows, plan)
    chosen = {name: make for name, make in VARIANTS.items() if not options.quick or name not in LONG}
    players = check_parity(rows, plan, chosen)
    measure(rows, plan, players)
    more = {"threads": options.threads, "rows_of_a_step": plan.rows, "samples_of_a_padded_step": plan.samples}
    result_file.write(result_file.result("sft", rows, GOALS, PACKAGES, options.quick, **more), options.out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one layer, short rows, two rounds, no goals")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant is timed")
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the shared conversations")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    return parser.parse_args()


def plan_of(options: argparse.Namespace) -> Plan:
    """The 26M shape and rows of 512 tokens; a GPU takes more of them at once."""
    on_gpu = runtime.device().type == "cuda"
    context = 256 if options.quick else 512
    rows, micro_rows = (2, 2) if options.quick else (64, 64) if on_gpu else (8, 2)
    config = PRESETS["26m"].config(6400, context, 1e6)
    if options.quick:
        config = Shape(256, 1, 4, 2, 64, 704, "llama", tied=True).config(6400, context, 1e4)
    tokens = read_conversations(options.data, 300 if options.quick else None, context)
    mean = (len(tokens.tokens) - len(tokens.ends)) / len(tokens.ends)
    samples = max(4, round(rows * context / mean / 4) * 4)
    rounds, steps = (2, 2) if options.quick else (options.rounds, options.steps)
    return Plan(config, tokens, context, rows, micro_rows, samples, rounds, steps)


def tell_data(rows: Rows, plan: Plan) -> None:
    """What is trained on."""
    assert plan.tokens.loss is not None
    add(rows, "data.samples", [len(plan.tokens.ends)], "samples that fit into a row")
    add(rows, "data.tokens", [len(plan.tokens.tokens)], "tokens")
    add(rows, "data.labels", [int(plan.tokens.loss.sum())], "tokens that are learnt")
    add(rows, "data.longest", [int(max(torch.tensor(plan.tokens.ends).diff()))], "tokens")


def ours(plan: Plan, compiled: bool = True) -> Player:
    """The loop's own step on packed rows."""
    loop = LoopRecipe(
        context=plan.context,
        batch_rows=plan.rows,
        micro_rows=plan.micro_rows,
        dtype="bfloat16",
        compile=compiled,
    )
    rows = plan.packed
    return Player(loop_step(plan.config, loop, rows), rows.batches(plan.rows), useful_of, held_of)


def useful_of(batch: Batch) -> int:
    """Positions of a packed batch that belong to a sample."""
    return int((batch.segments >= 0).sum())


def held_of(batch: Batch) -> int:
    """All positions of a packed batch."""
    return batch.segments.numel()


def hf_packed(plan: Plan, compiled: bool = False) -> Player:
    """transformers on our rows; it makes the block mask of the positions."""

    def parts(batch: Batch) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for start in range(0, plan.rows, micro_rows):
            some = batch.rows(start, start + micro_rows)
            yield {"input_ids": some.input_ids, "position_ids": some.positions}, some.labels

    micro_rows = plan.rows if runtime.device().type == "cuda" else plan.micro_rows
    step = hf_step(plan.config, parts, lambda batch: batch.label_count, compiled)
    return Player(step, plan.packed.batches(plan.rows), useful_of, held_of)


def hf_padded(plan: Plan, micro_rows: int, grouped: bool = False) -> Player:
    """transformers on padded samples, `micro_rows` at a time."""

    def parts(batch: list[Padded]) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for some in batch:
            yield {"input_ids": some.input_ids, "attention_mask": some.attention_mask}, some.labels

    def labels(batch: list[Padded]) -> int:
        return sum(int((some.labels != IGNORE).sum()) for some in batch)

    return Player(
        hf_step(plan.config, parts, labels),
        padded_batches(plan.tokens, plan.samples, min(micro_rows, plan.samples), 0, grouped),
        lambda batch: sum(some.useful for some in batch),
        lambda batch: sum(some.input_ids.numel() for some in batch),
    )


Parts = Callable[[Any], Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]]


def hf_step(
    config: ModelConfig, parts: Parts, count: Callable[[Any], int], compiled: bool = False
) -> Callable[[Any], float]:
    """A step of transformers' Llama over the parts of a batch, their labels weighed alike."""
    from transformers import LlamaConfig, LlamaForCausalLM

    device = runtime.device()
    model = LlamaForCausalLM(LlamaConfig(**config.to_hf("float32"), attn_implementation="sdpa"))
    lacking = model.load_state_dict(state_of(config), strict=False)
    assert not lacking.unexpected_keys and set(lacking.missing_keys) <= {"lm_head.weight"}, lacking
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True, **ADAMW)
    called = torch.compile(model, dynamic=False) if compiled else model

    def step(batch: Any) -> float:
        total, labels = 0.0, count(batch)
        for inputs, wanted in parts(batch):
            there = {name: value.to(device) for name, value in inputs.items()}
            with torch.autocast(device.type, torch.bfloat16):
                logits = called(**there, use_cache=False).logits
            flat = logits.float().flatten(0, 1)
            loss = F.cross_entropy(flat, wanted.to(device).flatten(), reduction="sum") / labels
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


SMALL, LARGE = 4, 1 << 20
VARIANTS: dict[str, Callable[[Plan], Player]] = {
    "ours": ours,
    "hf_padded_small": lambda plan: hf_padded(plan, SMALL),
    "hf_padded_large": lambda plan: hf_padded(plan, LARGE),
    "hf_grouped_small": lambda plan: hf_padded(plan, SMALL, grouped=True),
    "hf_grouped_large": lambda plan: hf_padded(plan, LARGE, grouped=True),
    "hf_packed": hf_packed,
    "hf_packed_compiled": lambda plan: hf_packed(plan, compiled=True),
    "ours_eager": lambda plan: ours(plan, compiled=False),
}
LONG = ("hf_packed_compiled",)
BEST = {
    "hf_padded": ("hf_padded_small", "hf_padded_large"),
    "hf_grouped": ("hf_grouped_small", "hf_grouped_large"),
}


def check_parity(rows: Rows, plan: Plan, chosen: dict[str, Callable[[Plan], Player]]) -> dict[str, Player]:
    """The losses of the first steps on one batch must agree, packed or padded; the first one compiles."""
    with plan.packed.batches(plan.rows) as stream:
        batch = next(stream)
    numbers = numbers_of(batch)
    found: dict[str, list[float]] = {}
    players: dict[str, Player] = {}
    for name, make in chosen.items():
        player = players[name] = make(plan)
        size = SMALL if name.endswith("small") else len(numbers)
        alone = [padded(plan.tokens, numbers[i : i + size]) for i in range(0, len(numbers), size)]
        same = alone if name.startswith(("hf_padded", "hf_grouped")) else batch
        started = time.perf_counter()
        found[name] = [player.step(same)]
        add(rows, f"first_step_s.{name}", [time.perf_counter() - started], "s, compiling included")
        found[name] += [player.step(same) for _ in range(PARITY_STEPS - 1)]
    for name, losses in found.items():
        worst = max(abs(a - b) for a, b in zip(losses, found["hf_padded_large"], strict=True))
        add(rows, f"parity.{name}", [worst], "nats from hf_padded_large, the worst of 3 steps on one batch")
        if worst > TOLERANCE:
            sys.exit(f"benchmarks/sft.py: {name} computes other losses: {losses}, {found['hf_padded_large']}")
    return players


def measure(rows: Rows, plan: Plan, players: dict[str, Player]) -> None:
    """Every variant's steps in turn, round after round; speed, padding, ratios."""
    for player in players.values():
        timed(player, WARM_STEPS)
    cpu: dict[str, list[float]] = {name: [] for name in players}
    wall: dict[str, list[float]] = {name: [] for name in players}
    padding: dict[str, list[float]] = {name: [] for name in players}
    for _ in range(plan.rounds):
        for name, player in players.items():
            seconds, used, useful, held = timed(player, plan.steps)
            cpu[name].append(useful / used)
            wall[name].append(useful / seconds)
            padding[name].append(1 - useful / held)
    speed = wall if runtime.device().type == "cuda" else cpu  # others use a CPU too: its seconds count
    for name in players:
        add(rows, f"useful_tokens_per_cpu_s.{name}", cpu[name], "tokens/CPU s")
        add(rows, f"useful_tokens_per_s.{name}", wall[name], "tokens/s")
        add(rows, f"padding_share.{name}", padding[name], "share of the positions")
        if name != "ours":
            add(rows, f"speedup.{name}", ratios(speed, name), "times")
    for name, sizes in BEST.items():
        quickest = max(sizes, key=lambda size: statistics.median(speed[size]))
        add(rows, f"speedup.{name}", ratios(speed, quickest), f"times, over {quickest}")


def timed(player: Player, steps: int) -> tuple[float, float, int, int]:
    """Seconds, CPU seconds, useful positions and all positions of some steps, their batches included."""
    started, used, useful, held = time.perf_counter(), time.process_time(), 0, 0
    for _ in range(steps):
        batch = next(player.batches)
        player.step(batch)
        useful += player.useful(batch)
        held += player.held(batch)
    return time.perf_counter() - started, time.process_time() - used, useful, held


def ratios(speed: dict[str, list[float]], name: str) -> Sequence[float]:
    """Ours over a peer, round by round."""
    return [own / theirs for own, theirs in zip(speed["ours"], speed[name], strict=True)]


if __name__ == "__main__":
    main()
