"""The JSON object that every benchmark prints: its goals, its machine, where it is written."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microlm.core import runtime

Rows = list[dict[str, Any]]
Goal = tuple[float, str, str]
"""Target, which direction is better (min, max), where the target stands."""


def add(rows: Rows, name: str, values: Sequence[float], unit: str) -> None:
    """Enter the figure of one or more runs, and their median; tell it on stderr."""
    value = statistics.median(values)
    extremes = {"min": min(values), "max": max(values)}
    rows.append({"name": name, "value": value, "unit": unit, "runs": len(values), **extremes})
    print(f"{name}: {value:.5g} {unit}", file=sys.stderr)


def result(
    name: str,
    rows: Rows,
    wanted: Mapping[str, Goal],
    packages: Sequence[str],
    quick: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """The whole object of a run of this process on this machine; quick runs have no goals. `more` follows."""
    values = {row["name"]: row["value"] for row in rows}
    return {
        "schema_version": 1,
        "benchmark": f"{name}-quick" if quick else name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": runtime.code_commit(),
        "machine": machine(runtime.environment(1)),
        "versions": {package: runtime.package_version(package) for package in packages},
        "load": round(os.getloadavg()[0], 1),
        "rows": rows,
        "goals": [] if quick else goals(wanted, values),
        **more,
    }


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
