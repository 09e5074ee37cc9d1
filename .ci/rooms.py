"""JUnit files of the test runs → a table of time by room, then `N passed in S s`, as pytest would say it."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOMS = ("core", "text", "model", "train", "engine", "export", "serve", "eval", "cli", "contracts", "e2e")


def room_of(case: ET.Element, file: Path) -> str:
    """The folder under tests/, or e2e for the whole end-to-end run."""
    if "e2e" in file.stem:
        return "e2e"
    parts = case.get("classname", "").removeprefix("tests.").split(".")
    return parts[0] if parts[0] in ROOMS else "other"


def table(files: list[Path]) -> str:
    """Tests, failures, skips and seconds (summed over workers) of each room."""
    rows: dict[str, list[float]] = {room: [0, 0, 0, 0.0] for room in (*ROOMS, "other")}
    for file in files:
        for case in ET.parse(file).getroot().iter("testcase"):
            bad = case.find("failure") is not None or case.find("error") is not None
            skipped = case.find("skipped") is not None
            row = rows[room_of(case, file)]
            row[0] += not (bad or skipped)
            row[1] += bad
            row[2] += skipped
            row[3] += float(case.get("time", 0))
    passed, failed, skips, seconds = (sum(column) for column in zip(*rows.values(), strict=True))
    lines = [f"{'room':<10} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>9}"]
    for room, (p, f, s, t) in rows.items():
        if p + f + s or room != "other":
            lines.append(f"{room:<10} {p:>7.0f} {f:>7.0f} {s:>8.0f} {t:>9.1f}")
    others = "".join(
        f", {count:.0f} {word}" for count, word in ((failed, "failed"), (skips, "skipped")) if count
    )
    return "\n".join([*lines, f"{passed:.0f} passed{others} in {seconds:.1f} s"])


if __name__ == "__main__":
    print(table([Path(name) for name in sys.argv[1:]]))
