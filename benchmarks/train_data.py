"""The data path of training in figures: padding, positions a second, a far place, the wait of a real run.

Reads --shards, a shards artifact with documents and conversations (`microlm run quickstart` makes
runs/quickstart/shards). Beside it stands the plain way: samples in their order, a new row where one does not
fit whole. --quick takes fewer rows and steps, and has no goals.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts import result_file
from parts.result_file import Rows, add

from microlm.core.manifest import open_artifact
from microlm.core.recipe import build
from microlm.text.shards import TokenSet, open_sets
from microlm.train import pretrain
from microlm.train.batches import PackedRows
from microlm.train.pretrain import PretrainRecipe

CONTEXT, ROWS = 256, 16
MIXTURE = {"extraction": 0.68, "question": 0.15, "reading": 0.06, "chat": 0.02, "documents": 0.09}
FAR = 10_000_000
PACKAGES = ("microlm", "torch", "numpy")
GOALS: dict[str, result_file.Goal] = {
    "padding_share.documents": (0.0, "min", "issue 5: packed without padding"),
    "padding_share.mixture": (0.01, "min", "the quickstart's mixture for sft"),
    "enter_far_s": (1.0, "min", "the place after 9.9 million samples of 10, no replay"),
    "data_wait_share": (0.01, "min", "issue 5: less than 1 % of a step, a 4M model on this machine"),
}


def main() -> None:
    """Measure and print."""
    options = parse_options()
    rows: Rows = []
    for name, sets, weights in mixtures(options.shards):
        measure_packing(rows, name, sets, weights, 50 if options.quick else 400)
    measure_far_place(rows)
    for workers in (0, 1):
        measure_wait(rows, options.shards, workers, 5 if options.quick else 30)
    result = result_file.result("train_data", rows, GOALS, PACKAGES, options.quick)
    result_file.write(result, options.out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path("runs/quickstart/shards"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def mixtures(shards: Path) -> Iterator[tuple[str, dict[str, TokenSet], dict[str, float]]]:
    """What is packed: documents alone, conversations alone, both."""
    documents, talks = open_sets(shards, "documents", "train"), open_sets(shards, "conversations-", "train")
    yield "documents", documents, {}
    yield "conversations", talks, {}
    yield "mixture", documents | talks, MIXTURE


def measure_packing(
    rows: Rows,
    name: str,
    sets: Mapping[str, TokenSet],
    weights: Mapping[str, float],
    batches: int,
) -> None:
    """Padding and labels of the first batches, and the processor time that they take."""
    packed = PackedRows(sets, weights, CONTEXT, seed=0)
    stream = packed.batches(ROWS)
    next(stream)
    started = time.process_time()
    found = list(itertools.islice(stream, batches))
    seconds = time.process_time() - started
    positions, state = batches * ROWS * CONTEXT, stream.state()
    add(rows, f"padding_share.{name}", [state["padding"] / (state["rows"] * CONTEXT)], "share of positions")
    add(rows, f"padding_share.{name}.plain", [plain_padding(found, sets)], "share of positions")
    add(rows, f"label_share.{name}", [sum(b.label_count for b in found) / positions], "share of positions")
    add(rows, f"positions_per_cpu_s.{name}", [positions / seconds], "positions/CPU s")


def plain_padding(batches: list[Any], sets: Mapping[str, TokenSet]) -> float:
    """Padding when the same samples, shuffled, fill rows whole; documents are cut to a row's length."""
    filled, count, room = 0, 0, 0
    order = sorted({sample for b in batches for row in b.samples for sample in row})
    for name, number in np.random.default_rng(0).permutation(np.array(order, dtype=object)):
        ends = sets[name].ends
        length = int(ends[number] - (ends[number - 1] if number else 0)) - 1
        for size in (min(CONTEXT, length - at) for at in range(0, length, CONTEXT)):
            if size > room:
                count, room = count + 1, CONTEXT
            filled, room = filled + size, room - size
    return 1 - filled / (count * CONTEXT)


def measure_far_place(rows: Rows) -> None:
    """Seconds to the first batch at sample 9.9 million of 10; how long a walk there would take."""
    lengths = np.random.default_rng(0).integers(20, 120, FAR)
    ends = np.cumsum(lengths)
    tokens = np.broadcast_to(np.uint16(5), (int(ends[-1]),))
    packed = PackedRows({"documents": TokenSet("documents", tokens, None, ends)}, {}, CONTEXT, seed=0)
    stream = packed.batches(ROWS)
    started = time.perf_counter()
    for _ in range(50):
        next(stream)
    per_sample = (time.perf_counter() - started) / (packed.epochs(stream.state())["documents"] * FAR)
    state = stream.state() | {"places": [[0, FAR * 99 // 100]], "held": []}
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        next(packed.batches(ROWS, state))
        seconds.append(time.perf_counter() - started)
    add(rows, "enter_far_s", seconds, "s")
    add(rows, "walk_far_s", [per_sample * FAR * 99 / 100], "s, from 50 batches")


def measure_wait(rows: Rows, shards: Path, workers: int, steps: int) -> None:
    """A real run of the 4m preset in one process: the share of its steps' time that waits for data."""
    torch.set_num_threads(1)
    loop = {"tokens": steps * ROWS * CONTEXT, "workers": workers, "compile": False, "validation_rows": 0}
    with tempfile.TemporaryDirectory(prefix="microlm-bench-") as folder:
        recipe = build(
            PretrainRecipe,
            {
                "out": f"{folder}/model", "shards": str(shards), "architecture": {"preset": "4m"},
                "loop": loop, "parallel": {"processes": 1, "threads": 1},
            },
            "train_data",
        )  # fmt: skip
        pretrain.run(recipe)
        metrics = open_artifact(recipe.out).manifest["metrics"]
    suffix = "" if workers else ".workers_0"
    add(rows, f"data_wait_share{suffix}", [metrics["data_wait_share"]], "share of a step")
    add(rows, f"tokens_per_s{suffix}", [metrics["tokens_per_s"]], "tokens/s")


if __name__ == "__main__":
    main()
