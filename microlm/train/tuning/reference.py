"""The reference of DPO: what the start model gives both answers of every pair, computed once, then kept.

Enters: the decoder before its first step, rows of pairs. Leaves: their `references`, filled, and a file of
them in the resume folder: a run that goes on reads the same numbers; no second model lies in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from microlm.core import runtime, storage
from microlm.core.metrics import Progress
from microlm.model.transformer import Decoder
from microlm.train.batches.pairs import PairRows
from microlm.train.job import Job
from microlm.train.objectives.dpo import pair_logps
from microlm.train.ranks import Ranks
from microlm.train.step import Forward, make_forward, warm_up

FILE = "reference.safetensors"
_MADE_FOR = "made_for"


def add_references(ranks: Ranks, decoder: Decoder, job: Job, made_for: Mapping[str, Any]) -> None:
    """Fill the references of the job's rows: from the file if it is `made_for` the same, else by `decoder`.

    Each rank computes a share of the rows; a row's numbers do not depend on who does.
    """
    rows = {"train": job.train, "validation": job.validation}
    pairs = {split: some for split, some in rows.items() if isinstance(some, PairRows)}
    wanted = {f"{split}/{name}": t for split, some in pairs.items() for name, t in some.references.items()}
    place, mark = job.resume / FILE, json.dumps(made_for, sort_keys=True)
    stored = _read(place, mark) if ranks.rank == 0 else None
    known = bool(ranks.sum_(torch.tensor([float(stored is not None)])))
    if stored is not None:
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])
    if not known:
        _compute(ranks, decoder, job, list(pairs.values()))
    for tensor in wanted.values():
        ranks.sum_(tensor)  # of zeros, but for who read or computed it
    if not known and ranks.rank == 0:
        storage.write_atomic(place, save(wanted, {_MADE_FOR: mark}))


def _compute(ranks: Ranks, decoder: Decoder, job: Job, pairs: list[PairRows]) -> None:
    """This rank's share of the references."""
    decoder.to(runtime.device())
    forward = make_forward(decoder, job.loop)
    warm_up(ranks, forward, decoder, job)
    total = sum(len(some.fitting(rows.context)) for rows in pairs for some in rows.pairs.values())
    quiet = ranks.rank != 0
    with nullcontext() if quiet else Progress(f"{job.name}: reference", total, "pairs") as bar:
        for rows in pairs:
            for number, some in enumerate(_batches(rows, job.loop.micro_rows)):
                if number % ranks.size == ranks.rank:
                    _fill(rows, some, forward, decoder)
                if bar is not None:
                    bar.update(sum(map(len, some)))


def _batches(rows: PairRows, size: int) -> Iterator[list[Any]]:
    """The rows of `in_order`, `size` at a time, the last ones filled up with empty rows: one shape."""
    found: list[Any] = []
    for row in rows.in_order():
        found.append(row)
        if len(found) == size:
            yield found
            found = []
    if found:
        yield found + [[]] * (size - len(found))


def _fill(rows: PairRows, pieces: list[Any], forward: Forward, decoder: Decoder) -> None:
    """Gradients stay on, unused: without them torch.compile would build every block a second time."""
    batch = rows.assemble(pieces)
    seen, here = forward.seen(batch), batch.to(decoder.cos.device)
    logps = pair_logps(forward(here.input_ids, here.positions, seen), decoder, here).detach().cpu()
    for r, row in enumerate(pieces):
        for p, piece in enumerate(row):
            rows.references[rows.names[piece.group]][piece.sample] = logps[r, p]


def _read(place: Path, mark: str) -> dict[str, Tensor] | None:
    """The stored references; None when there are none, or they were made for something else."""
    try:
        with safe_open(place, framework="pt") as file:
            if (file.metadata() or {}).get(_MADE_FOR) == mark:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        pass
    return None
