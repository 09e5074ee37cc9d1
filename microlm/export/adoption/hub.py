"""Models of the Hugging Face hub, by its own library (extra 'hub'), which reads HF_ENDPOINT, HF_HOME, tokens.

Enters: `owner/name` and a revision. Leaves: a commit, and the folder of its files in the hub's cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from microlm.core.errors import UserError
from microlm.export.adoption import support
from microlm.export.adoption.licence import TEXTS

_COMMIT = re.compile("[0-9a-f]{40}")
_SMALL = ("*.json", "*.jinja", *TEXTS)
_WEIGHTS = ("model*.safetensors", "tokenizer.model")


@cache
def pinned(name: str, revision: str) -> str:
    """The commit that a revision (empty: the newest) stands for now; without a network, in the cache."""
    if _COMMIT.fullmatch(revision):
        return revision
    return _download(name, revision or None, ("config.json",)).name


@cache
def snapshot(name: str, commit: str) -> Path:
    """The folder of a commit. Small files come first: what they say cannot be adopted is not downloaded."""
    _download(name, commit, _SMALL)
    folder = _download(name, commit, ("config.json",))
    if not any(folder.glob("model*.safetensors")):
        _require_adoptable(name, commit, folder)
    return _download(name, commit, (*_SMALL, *_WEIGHTS))


def _require_adoptable(name: str, commit: str, folder: Path) -> None:
    support.require_template(support.require_tokenizer(folder, support.require_config(folder)))
    listed: list[str] = _asked(name, lambda hub: hub.HfApi().list_repo_files(name, revision=commit))
    pickles = [file for file in listed if file.endswith((".bin", ".pt", ".pth"))]
    if pickles and not any(file.endswith(".safetensors") for file in listed):
        raise support.pickled(f"hf:{name}", pickles[0])


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder of a revision, by the name of its commit; without a network, as the cache holds it."""

    def ask(hub: Any) -> str:
        return str(hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))

    return Path(_asked(name, ask))


def _asked(name: str, ask: Callable[[Any], Any]) -> Any:
    """What the hub's library answers; what it refuses, or cannot reach, is one sentence."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"source 'hf:{name}': needs the extra 'hub': pip install 'microlm[hub]'") from None
    try:
        return ask(huggingface_hub)
    except UserError:
        raise
    except Exception as e:  # the library raises its own kinds, and those of its HTTP client
        first = (str(e).strip().splitlines() or [""])[0][:160]
        raise UserError(
            f"source 'hf:{name}': cannot be loaded ({type(e).__name__}: {first}); check the name, revision "
            "and network, or download it where there is one and give its folder"
        ) from e
