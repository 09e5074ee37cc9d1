"""The quickstart's benchmark: a time that nobody measured is null, not the part that is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from toy_stages import TextRecipe, write_text

from microlm.core.artifact import Artifact


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/quickstart.py as a module."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("bench_quickstart", folder / "quickstart.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def make(out: Path, fail: str = "") -> Artifact:
    return write_text(TextRecipe(out=str(out), fail=fail))


def test_the_time_of_a_resumed_stage_is_null(quickstart: ModuleType, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "halves", fail="interrupt")
    halves = make(tmp_path / "halves")

    def values(*stages: Artifact) -> dict[str, float | None]:
        return {r["name"]: r["value"] for r in quickstart.time_rows(list(stages), quickstart.Measured())}

    seconds = round(whole.manifest["times"]["seconds"], 2)
    assert values(whole) == {"stage_s.whole": seconds, "stages_s": seconds, "wall_s": None}
    told = values(whole, halves)
    assert told == {"stage_s.whole": seconds, "stage_s.halves": None, "stages_s": None, "wall_s": None}
    goals = {g["name"]: g["ok"] for g in quickstart.result_file.goals(quickstart.GOALS, told)}
    assert goals["stages_s"] is None
