"""An adapter against all weights: the held-out loss after equal tokens of the same rows, from one model."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from parts.lora_inputs import RANK, rates_of
from parts.result_file import Rows, add

from microlm.core.metrics import FILE, read_metrics
from microlm.model import directory, lora
from microlm.train import objectives
from microlm.train.batches import PackedRows
from microlm.train.job import Job, LoopRecipe
from microlm.train.loop import train
from microlm.train.ranks import Ranks
from microlm.train.tuning import lora_recipe
from microlm.train.tuning.lora_recipe import LoraRecipe

ADAPTERS: dict[str, LoraRecipe | None] = {
    "full": None,
    "lora": LoraRecipe(rank=RANK, alpha=2.0 * RANK),
    "lora_int8": LoraRecipe(rank=RANK, alpha=2.0 * RANK, base_dtype="int8"),
}


class Course(NamedTuple):
    """What all runs have in common."""

    model: Path
    train: PackedRows
    validation: PackedRows
    tokens: int
    batch_rows: int
    micro_rows: int
    validation_rows: int
    dtype: str
    compile: bool


def compare(rows: Rows, course: Course, rates: dict[str, tuple[float, ...]]) -> None:
    """Every way at each of its rates; the best of each counts, and int8 goes at the best of the adapter."""
    best: dict[str, tuple[float, float]] = {}
    for name in ("full", "lora"):
        tries = {rate: run(rows, course, name, rate) for rate in rates[name]}
        best[name] = min((loss, rate) for rate, loss in tries.items())
    best["lora_int8"] = run(rows, course, "lora_int8", best["lora"][1]), best["lora"][1]
    for name, (loss, rate) in best.items():
        add(rows, f"held_out_loss.{name}", [loss], f"nats a label, rate {rate:g}")
    add(rows, "held_out_gap.lora", [best["lora"][0] / best["full"][0] - 1], "share above full tuning")
    add(rows, "int8_gap", [best["lora_int8"][0] - best["lora"][0]], "nats a label above the base in bf16")


def run(rows: Rows, course: Course, name: str, rate: float) -> float:
    """Train in a folder that is thrown away; the held-out loss at the end."""
    adapter = ADAPTERS[name]
    loop = LoopRecipe.model_validate({
        "tokens": course.tokens, "context": course.train.context, "batch_rows": course.batch_rows,
        "micro_rows": course.micro_rows, "dtype": course.dtype, "compile": course.compile,
        "validation_rows": course.validation_rows, "validation_steps": 10**6, "checkpoint_steps": 10**6,
    })  # fmt: skip
    torch.manual_seed(0)
    decoder = lora_recipe.load(course.model, loop.compute_dtype(), adapter, seed=0)
    if adapter:
        _tell_size(rows, name, decoder)
    with tempfile.TemporaryDirectory(prefix="microlm-lora-") as place:
        folder = Path(place)
        for part in ("resume", "logs"):
            (folder / part).mkdir()
        save = partial(lora.save_adapter, base_name="base", base_digest="") if adapter else directory.save
        job = Job(
            loop, rates_of(rate, schedule="linear", warmup_steps=5), objectives.make(loop.compiles()),
            course.train, course.validation, folder, name, save,
        )  # fmt: skip
        train(Ranks(0, 1), decoder, job)
        found = [r["validation_loss"] for r in read_metrics(folder / "logs" / FILE) if "validation_loss" in r]
        if adapter:
            save(decoder, folder / "adapter")
            size = (folder / "adapter/adapter_model.safetensors").stat().st_size
            add(rows, f"adapter_bytes.{name}", [size], "bytes on disk")
    add(rows, f"held_out_before.{name}", [found[0]], "nats a label")
    add(rows, f"held_out_after.{name}.{rate:g}", [found[-1]], "nats a label")
    return found[-1]


def _tell_size(rows: Rows, name: str, decoder: torch.nn.Module) -> None:
    sizes = [(p.numel(), p.requires_grad) for p in decoder.parameters()]
    trained = sum(n for n, grows in sizes if grows)
    add(rows, f"trained_share.{name}", [trained / sum(n for n, _ in sizes)], "share of the weights")
    held = sum(t.nbytes for t in (*decoder.parameters(), *decoder.model.buffers()))  # type: ignore[operator]
    add(rows, f"weight_bytes.{name}", [held], "bytes in memory, adapter included")
