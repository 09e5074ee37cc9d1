"""`adapter_config.json` as PEFT writes it ↔ `LoraConfig`. What would change the numbers unseen is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from microlm.core.errors import UserError
from microlm.model.directory import read_object
from microlm.model.lora.config import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
_DIGEST = "microlm_base_digest"
_INERT = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias",
    "init_lora_weights", "layers_pattern", "megatron_core", "qalora_group_size", _DIGEST,
})  # fmt: skip
"""Settings that are read here, or that say nothing about what a saved adapter computes."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is."""


def to_peft(config: LoraConfig, base_name: str, digest: str) -> dict[str, Any]:
    """The settings as PEFT reads them; `base_name` is what it resolves the base by."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        _DIGEST: digest,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": list(config.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def from_peft(path: Path) -> LoraConfig:
    """The checked settings of an adapter's directory."""
    data = read_config(path)
    targets = data["target_modules"]
    return LoraConfig(
        data["r"],
        data["lora_alpha"],
        "all-linear" if isinstance(targets, str) else tuple(targets),
        data.get("lora_dropout") or 0.0,
        bool(data.get("use_rslora")),
    )


def made_for(path: Path) -> str | None:
    """The digest of the base that an adapter's configuration states, if it does."""
    return read_config(path).get(_DIGEST)


def read_config(path: Path) -> dict[str, Any]:
    """The checked `adapter_config.json` of a plain LoRA adapter."""
    file = path / ADAPTER_CONFIG
    data = read_object(file, "a LoRA adapter's directory")
    if data.get("peft_type") != "LORA":
        raise UserError(f"{file}: not the configuration of a LoRA adapter; only LoRA is supported")
    if data.get("bias", "none") != "none":
        raise UserError(f"{file}: trained biases are not supported; use a plain LoRA adapter")
    if (start := data.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise UserError(
            f"{file}: 'init_lora_weights' is {start!r}, which changes the base too; convert the adapter with "
            "PEFT (path_initial_model_for_weight_conversion)"
        )
    for key, value in data.items():
        if value and key not in _INERT and not _is_empty(value):
            raise UserError(f"{file}: '{key}' is not supported; use a plain LoRA adapter")
    _require_targets(file, data.get("target_modules"))
    for key, kinds in (("r", int), ("lora_alpha", int | float), ("lora_dropout", int | float)):
        value = data.get(key, 0 if key == "lora_dropout" else None)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise UserError(f"{file}: '{key}' must be a number")
    return data


def _is_empty(value: Any) -> bool:
    """Whether a block holds settings of which none is set."""
    return isinstance(value, dict) and not any(value.values())


def _require_targets(file: Path, targets: Any) -> None:
    if targets == "all-linear":
        return
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise UserError(
            f"{file}: 'target_modules' must be all-linear, or a list of names such as q_proj (a pattern is "
            "not supported: give the names)"
        )
