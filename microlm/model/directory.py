"""HF directories: `config.json` + safetensors, one file or several with an index ↔ `Decoder`.

No private weight format exists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.model.config import ModelConfig, id_list
from microlm.model.transformer import Decoder, rope_tables

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
_EXPECTED = "a Hugging Face model directory"
_COMPUTED = ".rotary_emb.inv_freq"  # old Llama directories store what follows from rope_theta
SHARD_BYTES = 5_000_000_000
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def read_config(path: Path) -> ModelConfig:
    """The `config.json` of an HF directory, with all ids that `generation_config.json` ends answers at."""
    file = path / "config.json"
    config = ModelConfig.from_hf(read_object(file, _EXPECTED), str(file))
    if not (path / GENERATION).is_file():
        return config
    said = read_object(path / GENERATION, _EXPECTED).get("eos_token_id")
    try:
        ends = id_list([*id_list(config.hf_eos), *id_list(said)])
    except (TypeError, ValueError):
        raise UserError(f"{path / GENERATION}: eos_token_id {said!r} holds no ids; correct it") from None
    return replace(config, eos_token_id=next(iter(ends), None), more_eos_ids=ends[1:])


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


def load(
    path: Path,
    compute_dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
    weight_dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A decoder with the directory's weights, stored in any float type and kept in `weight_dtype`.

    `config` stands in for the stored one: the same shape with more positions, say.
    """
    config = config or read_config(path)
    with ExitStack() as stack:
        stored: dict[str, Any] = {}  # name → the open file that holds it
        for file in weight_files(path):
            opened = open_weights(file)
            stack.enter_context(opened)
            stored |= {name: opened for name in opened.keys() if not name.endswith(_COMPUTED)}  # noqa: SIM118
        if config.tie_word_embeddings:
            stored.pop("lm_head.weight", None)
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name, opened in stored.items()}
        with torch.device("meta"):  # a wrong size in config.json is found before it takes memory
            decoder = Decoder(config, compute_dtype)
        weights = dict(decoder.named_parameters())
        _require_fit(path, weights, shapes)
        for name in weights:
            _put(decoder, name, stored[name].get_tensor(name).to(weight_dtype, copy=True))
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    decoder.cos, decoder.sin = rope_tables(config)
    decoder.weights_from = str(path)
    return decoder


def _put(decoder: Decoder, name: str, weight: torch.Tensor) -> None:
    """Give a decoder without content one of its weights."""
    owner, _, attribute = name.rpartition(".")
    setattr(decoder.get_submodule(owner), attribute, nn.Parameter(weight))


def _require_fit(
    path: Path, wanted: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse stored tensors of other names or shapes than the architecture has."""
    if missing := sorted(set(wanted) - set(shapes)):
        raise UserError(
            f"{path}: the weights lack '{missing[0]}' ({len(missing)} missing); export the model again"
        )
    if extra := sorted(set(shapes) - set(wanted)):
        raise UserError(
            f"{path}: the weights hold an unknown '{extra[0]}'; the architecture does not match config.json"
        )
    for name, weight in wanted.items():
        if (found := shapes[name]) != (expected := tuple(weight.shape)):
            raise UserError(
                f"{path}: '{name}' has shape {found}, config.json says {expected}; export the model again"
            )


def save(
    decoder: Decoder, path: Path, dtype: torch.dtype = torch.float32, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `config.json`, `generation_config.json`, the weights in `dtype`; a tied head is stored once.

    Weights of more than `shard_bytes` go into several files and an index, as transformers writes them.
    """
    config = decoder.config
    shards = _shards({n: p.detach() for n, p in decoder.named_parameters()}, dtype, shard_bytes)
    with storage.explain_write(path):
        path.mkdir(parents=True, exist_ok=True)
        for old in (*path.glob("model*.safetensors"), path / INDEX):
            old.unlink(missing_ok=True)
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for name, shard in zip([WEIGHTS] if len(shards) == 1 else names, shards, strict=True):
            tensors = {n: p.to("cpu", dtype).contiguous() for n, p in shard.items()}
            save_file(tensors, path / name, metadata={"format": "pt"})
        if len(shards) > 1:
            total = sum(p.numel() for shard in shards for p in shard.values()) * dtype.itemsize
            owners = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
            write_json(
                path / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(owners.items()))}
            )
        write_json(path / "config.json", config.to_hf(_NAMES[dtype]))
        generation = {
            "eos_token_id": config.hf_eos,
            "pad_token_id": config.pad_token_id,
            "do_sample": False,
        }
        write_json(path / GENERATION, generation)


def _shards(
    weights: Mapping[str, torch.Tensor], dtype: torch.dtype, most: int
) -> list[dict[str, torch.Tensor]]:
    """The weights in order, cut so that no file holds more than `most` bytes (or one tensor)."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, weight in weights.items():
        size = weight.numel() * dtype.itemsize
        if shards[-1] and filled + size > most:
            shards.append({})
            filled = 0
        shards[-1][name] = weight
        filled += size
    return shards


def write_json(path: Path, value: object) -> None:
    """A JSON file as HF directories hold it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def weight_files(path: Path) -> list[Path]:
    """The file of the weights, or those that the index names."""
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    index = path / INDEX
    if not index.exists():
        raise UserError(
            f"{path}: no {WEIGHTS} there; expected a Hugging Face model directory with safetensors"
        )
    owners = read_object(index, _EXPECTED).get("weight_map")
    if not isinstance(owners, dict) or not owners or not all(isinstance(v, str) for v in owners.values()):
        raise UserError(f"{index}: holds no 'weight_map' of names to files; export the model again")
    names = sorted(set(owners.values()))
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise UserError(f"{index}: names the file {name!r}, which is not there; copy or export it again")
    return [path / name for name in names]


def open_weights(file: Path) -> Any:
    """An open safetensors file, its header read."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: not a whole safetensors file ({e}); copy or export it again") from None
