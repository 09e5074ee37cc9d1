"""Low-rank adapters (LoRA, 2106.09685) on a loaded decoder, kept in PEFT's directory format.

Enters: a decoder with its weights. Leaves: the same decoder with small trainable matrices, or merged again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.model.directory import read_object
from microlm.model.transformer import Decoder, Linear

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DIGEST = "microlm_base_digest"
_PREFIX = "base_model.model."  # what PEFT puts before the module's own name


@dataclass(frozen=True)
class LoraConfig:
    """The size and place of an adapter; the update is `alpha / rank · B A`."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"

    @property
    def modules(self) -> tuple[str, ...]:
        """The suffixes of the matrices that are adapted."""
        return ALL_LINEAR if isinstance(self.targets, str) else self.targets


class LoraLinear(nn.Module):
    """A frozen matrix and its low-rank update: `base(x) + scale · B (A x)`, in the input's precision."""

    def __init__(self, base: Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        self.config = config
        self.scale = config.alpha / config.rank

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A.to(x.dtype))
        return self.base(x) + F.linear(low, self.lora_B.to(x.dtype)) * self.scale

    def merged(self) -> Linear:
        """The base matrix with the update folded into it, in float32."""
        with torch.no_grad():
            update = self.lora_B.float() @ self.lora_A.float() * self.scale
            self.base.weight.copy_(self.base.weight.float() + update)
        return self.base


def apply(decoder: Decoder, config: LoraConfig, generator: torch.Generator | None) -> None:
    """Wrap the targeted matrices of a decoder that holds its weights, and freeze everything else.

    B is zero, so the start is exactly the base; A is kaiming-uniform, drawn on the CPU from `generator`.
    """
    _require_bare(decoder)
    linears = _linears(decoder)
    _require_fit(config, (name for _, name, _ in linears))
    decoder.requires_grad_(False)
    for parent, name, child in linears:
        if name in config.modules:
            wrapped = LoraLinear(child, config)
            _draw(wrapped.lora_A, generator)
            setattr(parent, name, wrapped)


def _linears(decoder: Decoder) -> list[tuple[nn.Module, str, Linear]]:
    """Parent, attribute and matrix of every linear layer inside the blocks, in a fixed order."""
    modules = list(decoder.model.layers.modules())
    return [(p, n, c) for p in modules for n, c in p.named_children() if isinstance(c, Linear)]


def _draw(weight: Tensor, generator: torch.Generator | None) -> None:
    bound = math.sqrt(1.0 / weight.shape[1])  # kaiming-uniform with a = √5, as PEFT starts
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


def adapted(decoder: Decoder) -> dict[str, LoraLinear]:
    """Module name (as HF names the matrix) → adapter, in the order of the layers."""
    return {name: m for name, m in decoder.named_modules() if isinstance(m, LoraLinear)}


def adapter_parameters(decoder: Decoder) -> list[nn.Parameter]:
    """The trainable matrices, A before B, in the order of the layers."""
    return [p for m in adapted(decoder).values() for p in (m.lora_A, m.lora_B)]


def merge(decoder: Decoder) -> None:
    """Fold every adapter into its matrix; the parameter names are HF's again."""
    for name, module in adapted(decoder).items():
        parent, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(parent), attribute, module.merged())
    decoder.requires_grad_(True)


def stored_name(parameter: str) -> str:
    """What PEFT's file calls a trainable matrix."""
    return f"{_PREFIX}{parameter}.weight"


def save_adapter(decoder: Decoder, path: Path, base_name: str, base_digest: str) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them.

    `base_name` is what PEFT resolves the base by; `base_digest` is the artifact that it must be.
    """
    modules = adapted(decoder)
    if not modules:
        raise UserError("lora: the model carries no adapter to save")
    config = next(iter(modules.values())).config
    tensors = {
        stored_name(f"{name}.lora_{side}"): weight.detach().to("cpu", torch.float32).contiguous()
        for name, m in modules.items()
        for side, weight in (("A", m.lora_A), ("B", m.lora_B))
    }
    with storage.explain_write(path):
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(_peft_config(config, base_name, base_digest), indent=2)
        (path / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _peft_config(config: LoraConfig, base_name: str, digest: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        _DIGEST: digest,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(config.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def load_adapter(decoder: Decoder, path: Path, base_digest: str | None = None) -> None:
    """Put a saved adapter on a decoder; when `base_digest` is given, one not made for it is refused."""
    _require_bare(decoder)
    config, pairs = read_pairs(decoder, path, base_digest)
    apply(decoder, config, None)
    with torch.no_grad():
        for name, m in adapted(decoder).items():
            for weight, stored in zip((m.lora_A, m.lora_B), pairs[name], strict=True):
                weight.copy_(stored)


def read_pairs(
    decoder: Decoder, path: Path, base_digest: str | None = None
) -> tuple[LoraConfig, dict[str, tuple[Tensor, Tensor]]]:
    """A saved adapter's configuration and its (A, B) by module, checked against a decoder without one."""
    data = read_config(path)
    made_for = data.get(_DIGEST)
    if base_digest is not None and made_for != base_digest:
        raise UserError(
            f"{path}: the adapter was made for model {str(made_for)[:12]}…, this one is {base_digest[:12]}…; "
            "give the model that it was trained on"
        )
    tensors = _read_tensors(path)
    config = LoraConfig(data["r"], data["lora_alpha"], tuple(data["target_modules"]))
    linears = {n: m for n, m in matrices(decoder).items() if n.rpartition(".")[2] in config.modules}
    _require_fit(config, linears)
    wanted = {
        stored_name(f"{name}.lora_{side}"): shape
        for name, m in linears.items()
        for side, shape in (("A", (config.rank, m.in_features)), ("B", (m.out_features, config.rank)))
    }
    if odd := sorted(set(wanted) ^ set(tensors)):
        raise UserError(
            f"{path}: '{odd[0]}' is not in both adapter and model; give the model it was trained on"
        )
    for name, shape in wanted.items():
        if (found := tuple(tensors[name].shape)) != shape:
            raise UserError(f"{path}: '{name}' has shape {found}, the model needs {shape}")
    pairs = {n: (tensors[stored_name(f"{n}.lora_A")], tensors[stored_name(f"{n}.lora_B")]) for n in linears}
    return config, pairs


def made_for(path: Path) -> str | None:
    """The digest of the base that an adapter's configuration states, if it does."""
    return read_config(path).get(_DIGEST)


def matrices(decoder: Decoder) -> dict[str, Any]:
    """Every linear layer inside the blocks by HF's name, a quantized one too."""
    return {
        f"model.layers.{name}": m
        for name, m in decoder.model.layers.named_modules()
        if hasattr(m, "in_features")
    }


def _require_bare(decoder: Decoder) -> None:
    if adapted(decoder):
        raise UserError("lora: the model carries an adapter already; merge it first")


def _require_fit(config: LoraConfig, names: Iterable[str]) -> None:
    if config.rank < 1:
        raise UserError(f"lora: rank is {config.rank}; set it to 1 or more")
    if missing := sorted(set(config.modules) - {name.rpartition(".")[2] for name in names}):
        raise UserError(f"lora: the model has no matrix '{missing[0]}'; choose from {', '.join(ALL_LINEAR)}")


def read_config(path: Path) -> dict[str, Any]:
    """The checked `adapter_config.json` of a plain LoRA adapter."""
    file = path / ADAPTER_CONFIG
    data = read_object(file, "a LoRA adapter's directory")
    if data.get("peft_type") != "LORA":
        raise UserError(f"{file}: not the configuration of a LoRA adapter; only LoRA is supported")
    for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if data.get(key):
            raise UserError(f"{file}: '{key}' is not supported; use a plain LoRA adapter")
    if data.get("bias", "none") != "none":
        raise UserError(f"{file}: trained biases are not supported; use a plain LoRA adapter")
    targets = data.get("target_modules")
    if targets == "all-linear":
        data["target_modules"] = list(ALL_LINEAR)
    elif not _are_words(targets):
        raise UserError(f"{file}: 'target_modules' must be a list of names such as q_proj")
    if not isinstance(data.get("r"), int) or not isinstance(data.get("lora_alpha"), int | float):
        raise UserError(f"{file}: 'r' and 'lora_alpha' must be numbers")
    return data


def _are_words(value: Any) -> bool:
    return (
        isinstance(value, Iterable) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / ADAPTER_WEIGHTS
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no {ADAPTER_WEIGHTS} there; expected a LoRA adapter's directory") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: not a whole safetensors file ({e}); copy or make it again") from None
