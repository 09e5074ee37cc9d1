"""The newest intact checkpoint that fits this run → weights, optimizers and position."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from microlm.core.errors import UserError
from microlm.train.checkpoint import folder as folders
from microlm.train.checkpoint.position import Position
from microlm.train.checkpoint.trained import Trained

_ORDER = (
    "inputs.shards",
    "inputs.data",
    "recipe.seed",
    "recipe.mixture",
    "recipe.too_long",
    "recipe.tasks",
    "recipe.answers.prompts",
    "recipe.answers.group",
    "recipe.answers.max_tokens",
    "recipe.loop.context",
    "recipe.loop.document_mask",
)


def restore(
    folder: Path,
    trained: Trained,
    fingerprint: Mapping[str, Any],
    *,
    allow_mismatch: bool = False,
    before: int | None = None,
    quiet: bool = False,
) -> Position | None:
    """Load the newest intact checkpoint (of a step `before` that one); None when there is none.

    A damaged one is passed over, with a warning that names the file. One that was made with another
    `fingerprint` is refused, unless `allow_mismatch`: then the position says what differed.
    """
    damages: list[str] = []
    for place in checkpoints(folder)[::-1]:
        if before is not None and step_of(place) >= before:
            continue
        try:
            index = folders.read(place)
        except folders.Damaged as e:
            damages.append(str(e))
            continue
        if damages and not quiet:
            warnings.warn(f"{'; '.join(damages)}; going on from {place.name}", stacklevel=2)
        at = Position(**index["position"])
        _compare(place, index["fingerprint"], fingerprint, at, allow_mismatch, quiet)
        trained.load(place)
        return at
    if damages:
        raise UserError(f"{'; '.join(damages)}; no intact checkpoint is left: remove {folder} to start anew")
    return None


def checkpoints(folder: Path, kind: str = "step") -> list[Path]:
    """The checkpoints of a folder, intact or not, oldest first."""
    return sorted(p for p in folder.glob(f"{kind}-*") if p.is_dir() and not p.name.endswith(folders.PART))


def step_of(place: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(place.name.rpartition("-")[2])


def _compare(
    place: Path, old: Mapping[str, Any], new: Mapping[str, Any], at: Position, allow: bool, quiet: bool
) -> None:
    """Note in `at` what differs, or refuse it."""
    found = list(_differences(old, new))
    if not found:
        return
    told = "; ".join(found[:4]) + (f"; {len(found) - 4} more" if len(found) > 4 else "")
    if not allow:
        raise UserError(
            f"{place}: was made with other settings ({told}); put them back, remove {place.parent} to start "
            "anew, or go on all the same with loop.allow_mismatch=true, which the manifest will tell"
        )
    if not quiet:
        warnings.warn(f"{place}: going on although settings differ ({told})", stacklevel=3)
    at.mismatches = [*at.mismatches, *(f"from step {at.step}: {what}" for what in found)]
    if any(what.startswith(_ORDER) for what in found):
        at.data = {}  # a place in another order of rows means nothing


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in sorted({*old, *new}):
        was, now, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now, f"{name}.")
        elif was != now:
            yield f"{name} was {_short(was)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
