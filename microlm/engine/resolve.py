"""What a user calls a model → its Hugging Face directory: a run's best finished stage, or the place."""

from __future__ import annotations

from pathlib import Path

from microlm.core import storage
from microlm.core.errors import UserError

STAGES = ("export", "merge", "grpo", "dpo", "distil", "sft", "pretrain", "adopt")  # best first
BASES = ("pretrain", "adopt")
CONFIG = "config.json"


def resolve_model_dir(place: str | Path, base: bool = False) -> Path:
    """The model directory of a run, a stage, or the place itself. `base` asks for a run's pretrained one."""
    path = storage.fetch(str(place))
    if not path.is_dir():
        raise UserError(
            f"{place}: no such directory; give a run such as runs/quickstart, or a model directory"
        )
    if (path / CONFIG).exists():
        return _base_beside(path, place) if base else path
    for stage in BASES if base else STAGES:
        folder = path / stage
        if (folder / storage.MANIFEST).exists() and (folder / CONFIG).exists():
            return folder
    wanted = f"stage of {', '.join(BASES if base else STAGES)}"
    raise UserError(
        f"{place}: no model there: neither {CONFIG} nor a finished {wanted}; "
        "finish the run with 'microlm run', or check the path"
    )


def is_model_dir(place: str | Path) -> bool:
    """Whether a model lies directly at `place`."""
    return storage.exists(storage.join(str(place), CONFIG))


def _base_beside(path: Path, place: str | Path) -> Path:
    """The pretrained or adopted model of the run that a stage's directory belongs to."""
    beside = [path.resolve().parent / stage for stage in BASES]
    for folder in [path] if path.name in BASES else beside:
        if (folder / CONFIG).exists():
            return folder
    raise UserError(
        f"{place}: belongs to no run with a finished stage of {', '.join(BASES)}; name the run, or leave "
        "--base out"
    )
