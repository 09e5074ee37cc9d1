"""A Hugging Face directory's chat templates. Enters: a folder. Leaves: Jinja texts, names of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from microlm.core.errors import UserError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What transformers hands to every template beside the messages."""


def read_sources(path: Path) -> dict[str, str]:
    """The templates by name: `default`, and `tool_use` where there is one for conversations with tools.

    As in transformers, `chat_template.jinja` goes before what `tokenizer_config.json` says.
    """
    found = _config(path).get("chat_template")
    file = path / "chat_template.jinja"
    if isinstance(found, list):
        found = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
    sources = found if isinstance(found, dict) else {"default": found} if found else {}
    if file.is_file():
        try:
            sources["default"] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{file}: byte {e.start} is not UTF-8; save the template again") from None
    for name, source in sources.items():
        if not isinstance(source, str):
            raise UserError(f"{path}: chat template '{name}' is {type(source).__name__}, expected a text")
    if sources and "default" not in sources:
        names = ", ".join(sorted(sources))
        raise UserError(f"{path}: of its chat templates ({names}) none is 'default'; name one so")
    return sources


def special_tokens(path: Path) -> dict[str, str]:
    """The named special tokens: `bos_token`, `eos_token` …"""
    named = _read(path / "special_tokens_map.json") | _config(path)
    words = {name: named[name] for name in NAMED_TOKENS if named.get(name) is not None}
    return {name: str(word["content"] if isinstance(word, dict) else word) for name, word in words.items()}


def _config(path: Path) -> dict[str, Any]:
    return _read(path / "tokenizer_config.json")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not valid JSON ({str(e)[:100]}); copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
