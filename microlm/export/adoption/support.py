"""Whether a foreign directory can be adopted. Enters: a folder. Leaves: its parts, or a sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Message
from microlm.model import directory
from microlm.model.config import CLASS, ModelConfig
from microlm.text.chat import chat_ids
from microlm.text.chat.directory import read_sources
from microlm.text.tokenizer import FILES, Tokenizer

CONFIG = "config.json"
_HOUSE = "a Hugging Face model directory"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates")
_FLOATS = ("F64", "F32", "F16", "BF16")


def require_config(folder: Path) -> ModelConfig:
    """The architecture, if our decoder computes it; else UserError names what is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; give a {_HOUSE.removeprefix('a ')}, or hf:OWNER/NAME")
    if not (folder / CONFIG).is_file():
        raise _no_config(folder)
    config = directory.read_object(folder / CONFIG, _HOUSE)
    for name in (CONFIG, FILES[1]):
        said = directory.read_object(folder / name, _HOUSE) if (folder / name).is_file() else {}
        if said.get("auto_map"):
            raise UserError(
                f"{folder / name}: asks for Python code of its own (auto_map), which is never run here; "
                "adopt a model of a stock architecture"
            )
    _require_kind(folder / CONFIG, config)
    _require_plain(folder / CONFIG, config)
    return directory.read_config(folder)


def _no_config(folder: Path) -> UserError:
    if (folder / "adapter_config.json").is_file():
        base = directory.read_object(folder / "adapter_config.json", "an adapter").get(
            "base_model_name_or_path"
        )
        return UserError(f"{folder}: is an adapter, not a model; adopt its base ({base}), then merge them")
    files = sorted(folder.glob("*.gguf"))
    hint = f"; adopt gguf:{files[0]}" if files else f"; expected {_HOUSE}"
    return UserError(f"{folder}: no {CONFIG} there{hint}")


def _require_kind(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is no decoder of a stock Llama, Qwen2 or Qwen3."""
    kind, known = str(config.get("model_type")), unsupported()
    named = config.get("architectures") or []
    if not isinstance(named, list):
        raise UserError(f"{file}: architectures is {named!r:.40}, expected a list; copy the file again")
    classes = [str(name) for name in named]
    if config.get("is_encoder_decoder") or kind in known["encoder_decoders"]:
        raise UserError(f"{file}: {kind} is an encoder with a decoder; {_ONLY}")
    if kind in known["encoders"] or any("MaskedLM" in name for name in classes):
        raise UserError(f"{file}: {kind} is an encoder, which reads text and writes none; {_ONLY}")
    if kind not in CLASS:
        lacks = known["decoders"].get(kind)
        why = f"MicroLM's decoder lacks {lacks}" if lacks else "MicroLM does not know this architecture"
        raise UserError(f"{file}: model_type {kind!r} is not supported: {why}; {_ONLY}")
    if classes and CLASS[kind] not in classes:
        raise UserError(
            f"{file}: {classes[0]} has no head that predicts the next token; adopt a {CLASS[kind]}"
        )


_ONLY = "decoders of the stock architectures llama, qwen2 and qwen3 can be adopted"


def _require_plain(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse quantized weights."""
    found = config.get("quantization_config")
    if found:
        how = found.get("quant_method", "?") if isinstance(found, Mapping) else "?"
        raise UserError(
            f"{file}: the weights are quantized ({how}), and training needs them whole; adopt the model that "
            "this one was quantized from"
        )


@cache
def unsupported() -> Mapping[str, Any]:
    """What is known of other architectures: encoders, encoder_decoders, decoders → what ours lacks."""
    text = resources.files(__package__).joinpath("unsupported.json").read_text("utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found


def require_weights(folder: Path) -> list[Path]:
    """The safetensors files, each there, whole and of floating-point numbers."""
    for path in folder.iterdir():
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link that leads nowhere; copy or download the file again")
    if not (folder / directory.WEIGHTS).exists() and not (folder / directory.INDEX).exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise pickled(str(folder), pickles[0])
    files = directory.weight_files(folder)
    for file in files:
        with directory.open_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                if (kind := opened.get_slice(name).get_dtype()) not in _FLOATS:
                    raise UserError(
                        f"{file}: '{name}' is stored as {kind}: the weights are quantized, training needs "
                        "them whole; adopt the model that this one was quantized from"
                    )
    return files


def pickled(place: str, name: str) -> UserError:
    """The refusal of weights whose format can run code."""
    return UserError(
        f"{place}: the weights are pickled ({name}), a format that can run code when it is read; where you "
        "trust it, convert them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
    )


def require_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer, if it is of byte-level BPE and no larger than the embedding."""
    if not (folder / FILES[0]).is_file():
        others = [n for n in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / n).is_file()]
        found = f" (there is {others[0]})" if others else ""
        raise UserError(
            f"{folder}: no {FILES[0]} there{found}; write it: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab_size} "
            "rows; they do not belong together, take both from one model"
        )
    assert tokenizer.token_bytes, "reading them refuses what is not of byte-level BPE"
    return tokenizer


def require_template(tokenizer: Tokenizer) -> None:
    """A chat template that comes along renders a question, in the sandbox; UserError says why not."""
    for name in _OTHER_TEMPLATES:
        if (tokenizer.path / name).exists():
            raise UserError(
                f"{tokenizer.path / name}: chat templates are not read from there; put them into {FILES[3]}, "
                f"or by name into {FILES[1]}, and remove it"
            )
    if has_template(tokenizer.path):
        chat_ids(tokenizer, Conversation((Message("user", "?"),)), generation_prompt=True)


def has_template(folder: Path) -> bool:
    """Whether a chat template comes along."""
    return bool(read_sources(folder))
