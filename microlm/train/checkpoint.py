"""The resume state of an unfinished training stage: fp32 masters, optimizer state, step, history.

`step-N.safetensors` holds the tensors, `step-N.json` (written last) the rest and one hash over both; private,
deleted when the stage ends.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from microlm.core import storage

KEEP = 2


@dataclass
class Position:
    """Where a run stands: next step, tokens seen, rows logged, last steps' losses, place in the data."""

    step: int = 0
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path, parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], at: Position
) -> None:
    """Write a checkpoint for the step that comes next, then forget all but the last two."""
    tensors = {f"weight.{n}": p.detach() for n, p in parameters.items()}
    for name, state, key in _states(parameters, optimizers):
        tensors[f"state.{name}.{key}"] = state[key]
    data = save_tensors({n: t.contiguous() for n, t in tensors.items()})
    position = json.dumps(asdict(at))
    stem = f"step-{at.step:08d}"
    storage.write_atomic(folder / f"{stem}.safetensors", data)
    head = {"position": position, "sha256": _checksum(position, data)}
    storage.write_atomic(folder / f"{stem}.json", json.dumps(head).encode())
    for old in sorted(folder.glob("step-*.json"))[:-KEEP]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def restore(
    folder: Path, parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> Position:
    """Load the newest whole checkpoint into weights and optimizers; for a damaged one the one before."""
    for head_file in sorted(folder.glob("step-*.json"), reverse=True):
        found = _read(head_file)
        if found is None:
            continue
        position, tensors = found
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(tensors[f"weight.{name}"])
        _restore_states(parameters, optimizers, tensors)
        return position
    return Position()


def _read(head_file: Path) -> tuple[Position, dict[str, Tensor]] | None:
    """A checkpoint, or None when a byte of it is missing or changed."""
    try:
        head = json.loads(head_file.read_bytes())
        data = head_file.with_suffix(".safetensors").read_bytes()
        if _checksum(head["position"], data) != head["sha256"]:
            return None
        return Position(**json.loads(head["position"])), load_tensors(data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError):
        return None


def _checksum(position: str, data: bytes) -> str:
    whole = hashlib.sha256(position.encode())
    whole.update(data)
    return whole.hexdigest()


def _states(
    parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> list[tuple[str, dict[str, Tensor], str]]:
    """(parameter name, its state, key) of every tensor the optimizers keep."""
    names = {id(p): n for n, p in parameters.items()}
    return [
        (names[id(p)], state, key)
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key in sorted(state)
    ]


def _restore_states(
    parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    owner = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, p in parameters.items():
        prefix = f"state.{name}."
        state = {n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)}
        if state and id(p) in owner:
            owner[id(p)].state[p] = state
