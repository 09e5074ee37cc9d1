"""The tensors that a run changes, by parameter: trainable weights (fp32 masters), the optimizers' state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from microlm.core.errors import UserError
from microlm.model import lora
from microlm.model.transformer import Decoder
from microlm.train.optim import Muon

SHARD_BYTES = 1 << 30  # of a file of the optimizers' state
WEIGHTS, STATE = ("model*.safetensors", "adapter_model.safetensors"), "state-*.safetensors"

SaveWeights = Callable[[Decoder, Path], None]
"""How a stage writes its weights: the Hugging Face directory, or the adapter's."""


@dataclass(frozen=True)
class Trained:
    """A decoder under training and its optimizers; every rank holds them whole."""

    decoder: Decoder
    optimizers: list[torch.optim.Optimizer]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable ones by name."""
        return {n: p for n, p in self.decoder.named_parameters() if p.requires_grad}

    def step(self) -> None:
        """Apply the gradients, then forget them."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Make room for those of the next step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def states(self) -> dict[str, Tensor]:
        """`parameter name/key` → tensor, of all that the optimizers keep."""
        names = {id(p): n for n, p in self.parameters.items()}
        return {
            f"{names[id(p)]}/{key}": state[key]
            for optimizer in self.optimizers
            for p, state in optimizer.state.items()
            for key in sorted(state)
        }

    @property
    def weight_bytes(self) -> int:
        """What the weights of a checkpoint take on disk."""
        return sum(p.nbytes for p in self.parameters.values())

    @property
    def most_bytes(self) -> int:
        """What a checkpoint takes on disk at most: the weights and two moments of each."""
        states = sum(t.nbytes for t in self.states().values())
        return self.weight_bytes + (states or 2 * self.weight_bytes)

    def load(self, folder: Path) -> None:
        """Take weights and states from a checkpoint's folder."""
        parameters = self.parameters
        wanted = {_stored_name(n): p for n, p in parameters.items()}
        files = sorted(f for pattern in WEIGHTS for f in folder.glob(pattern))
        found: dict[str, Tensor] = {}
        for file in files:
            found |= _read(file, wanted)
        for name, p in wanted.items():
            if name not in found or found[name].shape != p.shape:
                shape = tuple(found[name].shape) if name in found else "missing"
                raise UserError(
                    f"{folder}: '{name}' is {shape} there and {tuple(p.shape)} in this model; "
                    "remove the folder to start from the beginning"
                )
        with torch.no_grad():
            for name, p in wanted.items():
                p.copy_(found[name])
        self._load_states(folder, parameters)

    def _load_states(self, folder: Path, parameters: Mapping[str, nn.Parameter]) -> None:
        groups = {id(p): (o, g) for o in self.optimizers for g in o.param_groups for p in g["params"]}
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for file in sorted(folder.glob(STATE)):
            for name, tensor in _read(file).items():
                owner, _, key = name.rpartition("/")
                p = parameters.get(owner)
                if p is not None and id(p) in groups:
                    optimizer, group = groups[id(p)]
                    beside = tensor.dim() > 0 or group.get("fused") or group.get("capturable")
                    optimizer.state[p][key] = tensor.to(p.device) if beside else tensor
        for optimizer in self.optimizers:
            keys = _state_keys(optimizer)
            for other in [owner for owner, state in optimizer.state.items() if set(state) != keys]:
                del optimizer.state[other]  # another optimizer's, where a mismatch is allowed


class Snapshot:
    """A copy of all of it in host memory, made again and again in the same place."""

    def __init__(self, trained: Trained) -> None:
        shared = {id(t): t for t in (*trained.decoder.parameters(), *trained.decoder.buffers())}
        own = {id(p): _host_parameter(p) for p in trained.parameters.values()}
        self.trained = trained
        self.decoder = copy.deepcopy(trained.decoder, {**shared, **own})
        self.states: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Copy everything as it is now."""
        copies = dict(self.decoder.named_parameters())
        for name, p in self.trained.parameters.items():
            copies[name].copy_(p, non_blocking=True)
        found = self.trained.states()
        self.states = {n: self.states[n] if n in self.states else _host(t) for n, t in found.items()}
        for name, tensor in found.items():
            self.states[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write_states(self, folder: Path) -> None:
        """The states as files of at most `SHARD_BYTES` (or one tensor)."""
        shards: list[dict[str, Tensor]] = [{}]
        filled = 0
        for name, tensor in self.states.items():
            if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
                shards.append({})
                filled = 0
            shards[-1][name] = tensor
            filled += tensor.nbytes
        for i, shard in enumerate(shards, 1):
            save_file(shard, folder / f"state-{i:05d}-of-{len(shards):05d}.safetensors")


def _state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    return {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}


def _host(tensor: Tensor) -> Tensor:
    return torch.empty_like(
        tensor, device="cpu", pin_memory=tensor.is_cuda, memory_format=torch.contiguous_format
    )


def _host_parameter(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_host(p.detach()), requires_grad=p.requires_grad)


def _stored_name(parameter: str) -> str:
    """What a trainable parameter is called in the weights' file."""
    return lora.stored_name(parameter) if "lora_" in parameter else parameter


def _read(file: Path, wanted: Mapping[str, object] | None = None) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as f:
        return {n: f.get_tensor(n) for n in f.keys() if wanted is None or n in wanted}  # noqa: SIM118
