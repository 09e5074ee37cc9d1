"""The JSON object that every benchmark prints: its goals, its machine, where it is written."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Goal = tuple[float, str, str]
"""Target, which direction is better (min, max), where the target stands."""


def goals(wanted: Mapping[str, Goal], values: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Each goal with the value reached; `ok` is null where nothing was measured."""
    found = []
    for name, (target, direction, against) in wanted.items():
        value = values.get(name)
        ok = None if value is None else value <= target if direction == "min" else value >= target
        goal = {"name": name, "value": value, "target": target, "direction": direction}
        found.append({**goal, "against": against, "ok": ok})
    return found


def machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Where the run was made; the processor's name only when that is this machine."""
    cpu = None
    if environment["platform"] == platform.platform() and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return {"cpu": cpu} | {key: environment[key] for key in ("cpus", "device", "platform")}


def write(result: Mapping[str, Any], out: Path | None) -> None:
    """Print the object, and keep it in a file if one is named."""
    text = json.dumps(result, ensure_ascii=False, indent=1)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    print(text)
