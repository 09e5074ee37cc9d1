"""HF directories: `config.json` + `model.safetensors` ↔ `Decoder`. No private weight format exists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.model.config import ModelConfig
from microlm.model.transformer import Decoder

WEIGHTS = "model.safetensors"
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def read_config(path: Path) -> ModelConfig:
    """The `config.json` of an HF directory."""
    file = path / "config.json"
    return ModelConfig.from_hf(read_object(file, "a Hugging Face model directory"), str(file))


def read_object(file: Path, folder: str) -> dict[str, Any]:
    """The JSON object in a file of a directory; `folder` says what that directory should be."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent}: no {file.name} there; expected {folder}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: not valid JSON; export or make it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(data).__name__}")
    return data


def load(path: Path, compute_dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with the directory's weights (kept as float32 masters when stored in any float type)."""
    config, tensors = read_config(path), _read_tensors(path)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    with torch.device("meta"):  # a wrong size in config.json is found before it takes memory
        _require_fit(path, dict(Decoder(config).named_parameters()), tensors)
    decoder = Decoder(config, compute_dtype)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            weight.copy_(tensors[name])
    return decoder


def _require_fit(path: Path, wanted: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse stored tensors of other names or shapes than the architecture has."""
    if missing := sorted(set(wanted) - set(tensors)):
        raise UserError(
            f"{path}: the weights lack '{missing[0]}' ({len(missing)} missing); export the model again"
        )
    if extra := sorted(set(tensors) - set(wanted)):
        raise UserError(
            f"{path}: the weights hold an unknown '{extra[0]}'; the architecture does not match config.json"
        )
    for name, weight in wanted.items():
        if tensors[name].shape != weight.shape:
            found, expected = tuple(tensors[name].shape), tuple(weight.shape)
            raise UserError(
                f"{path}: '{name}' has shape {found}, config.json says {expected}; export the model again"
            )


def save(decoder: Decoder, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `config.json`, `generation_config.json`, the weights in `dtype`; a tied head is stored once."""
    config = decoder.config
    tensors = {n: p.detach().to("cpu", dtype).contiguous() for n, p in decoder.named_parameters()}
    with storage.explain_write(path):
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        _write(path / "config.json", config.to_hf(_NAMES[dtype]))
        generation = {
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "do_sample": False,
        }
        _write(path / "generation_config.json", generation)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise UserError(
            f"{path}: no {WEIGHTS} there; expected a Hugging Face model directory with safetensors"
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    tensors[name] = f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: not a whole safetensors file ({e}); copy or export it again") from None
    return tensors
