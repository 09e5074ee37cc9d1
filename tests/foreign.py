"""Foreign models as their makers publish them: written by transformers itself, tiny and random."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from chat_models import write_model as write_tokenizer
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import normalizers

from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import MARKS

TEMPLATES = Path(__file__).parent / "text" / "templates"
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n\n# A model\n"
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def write_foreign(
    folder: Path,
    kind: str = "qwen2",
    template: str | None = "qwen2.5",
    *,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    **config: Any,
) -> Path:
    """A directory of `kind` with the template's tokenizer; without a template it is a base model."""
    text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8") if template else ""
    write_tokenizer(folder, text, LLAMA if template == "llama-3.1" else MARKS, None, words=(" Rome", "zz"))
    if template is None:
        (folder / "chat_template.jinja").unlink()
    if template == "llama-3.1":
        drop_chatml(folder)
    if kind != "llama":
        cut_as_qwen(folder)
    write_weights(folder, kind, dtype, shards, **config)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def write_weights(folder: Path, kind: str, dtype: torch.dtype, shards: bool, **config: Any) -> None:
    """Weights far from zero, saved by transformers."""
    name = CLASSES[kind]
    ids = HFTokenizer.from_file(str(folder / "tokenizer.json")).token_to_id
    end = ids("<|im_end|>") if ids("<|im_end|>") is not None else ids("<|eot_id|>")
    fields = {**SIZES, "vocab_size": 448, "eos_token_id": end, "bos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**(fields | config))
    model = getattr(transformers, f"{name}ForCausalLM")(settings).to(dtype)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")


def cut_as_qwen(folder: Path) -> None:
    """Qwen's pattern and normalizer: transformers gives them to every tokenizer of a Qwen model."""
    inner = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    inner.pre_tokenizer = Pieces("qwen", "runs").pre_tokenizer()
    inner.normalizer = normalizers.NFC()
    inner.save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")


def drop_chatml(folder: Path) -> None:
    """Llama's own control tokens and no others: `<|eot_id|>` ends a turn."""
    data = json.loads((folder / "tokenizer.json").read_bytes())
    words = {"<|im_start|>": "zA", "<|im_end|>": "zB", "<|endoftext|>": "zC"}
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in words]
    data["model"]["vocab"] = {words.get(t, t): i for t, i in data["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    edit(folder, "tokenizer_config.json", eos_token="<|eot_id|>", pad_token="<|end_of_text|>",
         bos_token="<|begin_of_text|>")  # fmt: skip


def edit(folder: Path, name: str, remove: Sequence[str] = (), **fields: Any) -> Path:
    """Change a JSON file of a directory; the directory."""
    file = folder / name
    data = json.loads(file.read_bytes()) if file.exists() else {}
    data = {k: v for k, v in (data | fields).items() if k not in remove}
    file.write_text(json.dumps(data), encoding="utf-8")
    return folder
