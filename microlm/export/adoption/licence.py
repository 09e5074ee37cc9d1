"""Under which licence a foreign model is. Enters: its folder. Leaves: a name, or `unknown`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

UNKNOWN = "unknown"
TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md")
"""What comes along with the weights: their terms, and the card that names them."""
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_BY_TEXT = (
    (r"apache license\s+version 2", "apache-2.0"),
    (r"\bmit license\b|permission is hereby granted, free of charge", "mit"),
    (r"llama 3\.(\d) community license", "llama3.{0}"),
    (r"meta llama 3 community license", "llama3"),
    (r"llama 2 community license", "llama2"),
    (r"qwen research license", "qwen-research"),
    (r"tongyi qianwen license", "tongyi-qianwen"),
    (r"gnu general public license\s+version 3", "gpl-3.0"),
)
_READ_BYTES = 1 << 16
_NAME_CHARS, _MOST_NAMES = 100, 8


def licence_of(folder: Path) -> str:
    """By the front matter of README.md, else by the text of LICENSE."""
    card = _card(folder)
    said = _names(card.get("license"))
    if said and said != ["other"]:
        return ", ".join(map(spdx, said))
    if names := _names(card.get("license_name")):
        return ", ".join(names)
    for file in sorted(f for pattern in TEXTS[:2] for f in folder.glob(pattern) if f.is_file()):
        text = " ".join(_read(file).lower().split())
        for pattern, name in _BY_TEXT:
            if found := re.search(pattern, text):
                return spdx(name.format(*found.groups()))
    return UNKNOWN


def _names(value: object) -> list[str]:
    """The names in a card's field; nothing else is written out: a few aliases of YAML are a long text."""
    found = value if isinstance(value, list) else [value]
    names = [name for name in found if isinstance(name, str) and len(name) <= _NAME_CHARS]
    if len(names) < len(found) or len(found) > _MOST_NAMES:
        return []
    return [name for name in names if name.strip()]


def spdx(name: object) -> str:
    """The hub's spelling of a licence as SPDX has it, so that equal licences are one."""
    text = str(name).strip()
    known = {"apache-2.0": "Apache-2.0", "mit": "MIT"}.get(text.lower())
    return known or (text.upper() if text.lower().startswith("cc") else text)


def _card(folder: Path) -> dict[str, Any]:
    """The front matter of the model card, {} where there is none that can be read."""
    file = folder / "README.md"
    found = _FRONT.match(_read(file).replace("\r\n", "\n")) if file.is_file() else None
    try:
        card = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def _read(file: Path) -> str:
    return file.open("rb").read(_READ_BYTES).decode("utf-8", "replace")
