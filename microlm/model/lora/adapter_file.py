"""An adapter's directory as PEFT has it: `adapter_model.safetensors` beside `adapter_config.json`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.model.lora.config import LoraConfig
from microlm.model.lora.layer import Pairs, adapted, apply, matrices, pairs_of, require_bare
from microlm.model.lora.peft_config import ADAPTER_CONFIG, from_peft, made_for, to_peft
from microlm.model.transformer import Decoder

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what PEFT puts before the module's own name


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
        stored_name(f"{name}.lora_{side}"): weight.to("cpu", torch.float32).contiguous()
        for name, pair in pairs_of(decoder).items()
        for side, weight in zip("AB", pair, strict=True)
    }
    with storage.explain_write(path):
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(to_peft(config, base_name, base_digest), indent=2)
        (path / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def load_adapter(decoder: Decoder, path: Path, base_digest: str | None = None) -> None:
    """Put a saved adapter on a decoder; when `base_digest` is given, one not made for it is refused."""
    require_bare(decoder)
    config, pairs = read_pairs(decoder, path, base_digest)
    apply(decoder, config, None)
    with torch.no_grad():
        for name, m in adapted(decoder).items():
            for weight, stored in zip((m.lora_A, m.lora_B), pairs[name], strict=True):
                weight.copy_(stored)


def read_pairs(decoder: Decoder, path: Path, base_digest: str | None = None) -> tuple[LoraConfig, Pairs]:
    """A saved adapter's configuration and its (A, B) by module, checked against a decoder without one."""
    config, base = from_peft(path), made_for(path)
    if base_digest is not None and not base:
        raise UserError(
            f"{path}: does not say which model it was made for, so it cannot be checked against "
            f"{base_digest[:12]}…; give an adapter that MicroLM trained, or merge it with PEFT and adopt the "
            "result"
        )
    if base and base_digest is not None and base != base_digest:
        raise UserError(
            f"{path}: the adapter was made for model {base[:12]}…, this one is {base_digest[:12]}…; "
            "give the model that it was trained on"
        )
    tensors = _read_tensors(path)
    linears = {n: m for n, m in matrices(decoder).items() if config.fits(n)}
    config.require_fit(linears)
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
    return config, {
        n: (tensors[stored_name(f"{n}.lora_A")], tensors[stored_name(f"{n}.lora_B")]) for n in linears
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / ADAPTER_WEIGHTS
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no {ADAPTER_WEIGHTS} there; expected a LoRA adapter's directory") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: not a whole safetensors file ({e}); copy or make it again") from None
