"""An export says aloud which licences of its data a person should look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from artifacts import sign, write_model

from microlm.core.artifact import Artifact
from microlm.export import hf

COUNTS = {"MIT": 90, "CC-BY-NC-4.0": 7, "CC-BY-SA-3.0": 1200, "unknown": 3}


@pytest.fixture
def licensed(tmp_path: Path) -> Artifact:
    def body(work: Any) -> None:
        work.licences |= {*COUNTS, "evil\n# heading <b> upstream unclear"}
        work.write_json("logs/audit.json", {"from_factbook": [], "licences": COUNTS})

    return sign(tmp_path / "data", "data", body)


def test_export_warns_of_licences_with_their_counts(
    licensed: Artifact, tokenizer: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "sft", tokenizer, licensed)
    made = hf.run(hf.ExportRecipe(out=str(tmp_path / "export"), model=str(model.path)))
    err = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert err == [
        "export: warning: the model comes from 7 records under CC-BY-NC-4.0 (non-commercial)",
        "export: warning: the model comes from 1,200 records under CC-BY-SA-3.0 (share-alike)",
        "export: warning: the model comes from an unknown number of records under"
        " evil?# heading <b> upstream unclear (unclear)",
        "export: warning: the model comes from 3 records under unknown (unclear)",
    ]
    card = made.file("README.md").read_text(encoding="utf-8")
    assert "- 1,200 records under CC-BY-SA-3.0 (share-alike)\n" in card
    assert (
        "- an unknown number of records under evil \\# heading \\<b\\> upstream unclear (unclear)\n" in card
    )
    warned = made.manifest["metrics"]["licence_warnings"]
    assert [(w["licence"], w["records"], w["asks"]) for w in warned if w["records"]] == [
        ("CC-BY-NC-4.0", 7, ["non-commercial"]), ("CC-BY-SA-3.0", 1200, ["share-alike"]),
        ("unknown", 3, ["unclear"]),
    ]  # fmt: skip


def test_plain_licences_need_no_warning(
    model: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = hf.run(hf.ExportRecipe(out=str(tmp_path / "export"), model=str(model.path)))
    assert "warning" not in capsys.readouterr().err
    assert "Look at these licences" not in made.file("README.md").read_text(encoding="utf-8")
    assert "licence_warnings" not in made.manifest["metrics"]
