"""The stage: a real model artifact and `microlm serve` process; the verdict's payload is equal twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import Field
from tiny_model import write_tiny_model

from microlm.core.artifact import Workspace, stage
from microlm.core.errors import CheckFailed
from microlm.core.recipe import StageRecipe
from microlm.eval.verify import stage as verify_stage
from microlm.eval.verify.stage import VerifyRecipe, run
from microlm.eval.verify.verdict import Failed, NotOffered, NotShown, Target


class ModelRecipe(StageRecipe):
    """A stand-in for export."""

    window: int = Field(512, description="positions")


@stage("tiny", "model", 1)
def make_model(recipe: ModelRecipe, work: Workspace) -> None:
    write_tiny_model(work.path, window=recipe.window)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(ModelRecipe(out=str(tmp_path_factory.mktemp("run") / "export"))).url


@pytest.mark.slow
def test_verdicts_on_a_served_model_are_equal_twice(model, tmp_path):
    made = [run(VerifyRecipe(out=str(tmp_path / name), model=model)) for name in ("a", "b")]
    assert made[0].digest == made[1].digest and made[0].kind == "verdict"
    lasting = made[0].json("verdict.json")
    assert (lasting["passed"], lasting["failed"], lasting["not_offered"]) == (12, 0, 0)
    assert all(set(c) == {"name", "status"} for c in lasting["checks"])
    logs = Path(made[0].path) / "logs"
    assert all(c["seconds"] > 0 for c in json.loads((logs / "verdict.json").read_text())["checks"])
    assert "<!doctype html>" in (logs / "verdict.html").read_text()
    assert "/v1/chat/completions 200" in (logs / "server.log").read_text()


@pytest.mark.slow
def test_our_own_server_must_offer_everything_but_a_small_model_need_not_show_it(
    model, tmp_path, monkeypatch
):
    def check_missing(_: Target) -> str:
        raise NotOffered("no such route")

    def check_unseen(_: Target) -> str:
        raise NotShown("the model says nothing")

    monkeypatch.setattr(verify_stage, "SMOKE", {"unseen": check_unseen})
    made = run(VerifyRecipe(out=str(tmp_path / "a"), model=model)).json("verdict.json")
    assert (made["passed"], made["failed"], made["not_offered"], made["not_shown"]) == (0, 0, 0, 1)
    monkeypatch.setattr(verify_stage, "SMOKE", {"missing": check_missing})
    with pytest.raises(CheckFailed, match=r"\(missing: not offered\)"):
        run(VerifyRecipe(out=str(tmp_path / "b"), model=model))


@pytest.mark.slow
def test_a_failed_line_fails_the_stage(model, tmp_path, monkeypatch):
    def check_nothing(_: Target) -> str:
        raise Failed("broken on purpose")

    monkeypatch.setattr(verify_stage, "SMOKE", {"nothing": check_nothing})
    out = tmp_path / "v"
    with pytest.raises(CheckFailed, match=r"1 of 1 checks failed \(nothing\)") as e:
        run(VerifyRecipe(out=str(out), model=model))
    assert not out.exists()
    assert Path(str(e.value).rpartition("see ")[2]).is_file()
