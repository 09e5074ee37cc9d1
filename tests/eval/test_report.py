"""The report's summary = the scores; the page asks for nothing from outside and shows Chinese."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from artifacts import sign

from microlm.core.artifact import Artifact, Workspace
from microlm.core.errors import UserError
from microlm.eval import report


@pytest.fixture(scope="module")
def verdict(run_dir: Path, model: Artifact) -> Artifact:
    def body(work: Workspace) -> None:
        checks = [{"name": "health", "status": "pass"}, {"name": "stream", "status": "fail"}]
        work.write_json("verdict.json", {"checks": checks, "passed": 1, "failed": 1, "not_offered": 0})

    return sign(run_dir / "verify", "verdict", body, model=str(model.path))


@pytest.fixture(scope="module")
def trained(run_dir: Path, data: Artifact) -> Artifact:
    """A model with a training log."""

    def body(work: Workspace) -> None:
        lines = [{"schema": 1, "step": i, "tokens": i * 100, "loss": 5 - i / 10} for i in range(20)]
        lines[-1]["validation_loss"] = None
        (work.logs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        work.metrics |= {"tokens": 1900, "peak_rss_bytes": 2**30}

    return sign(run_dir / "pretrain", "model", body, data=str(data.path))


@pytest.fixture(scope="module")
def recipe(run_dir: Path, scores: Artifact, verdict: Artifact, trained: Artifact) -> report.ReportRecipe:
    inputs = {"scores": scores, "scores_before": scores, "verify": verdict, "pretrain": trained}
    return report.ReportRecipe(out=str(run_dir / "report"), **{k: str(a.path) for k, a in inputs.items()})


@pytest.fixture(scope="module")
def made(recipe: report.ReportRecipe) -> Artifact:
    return report.run(recipe)


def test_summary_rows_are_the_headlines_with_gates(made: Artifact, scores: Artifact) -> None:
    rows = {r["name"]: r for r in report.summary_rows(made)}
    for headline in scores.json("scores.json")["headlines"]:
        row = rows.pop(headline["name"])
        assert {k: row[k] for k in ("value", "low", "high", "n")} == {
            k: headline[k] for k in ("value", "low", "high", "n")
        }
        assert row["before"] == headline["value"]
        assert {k: row[k] for k in headline["baselines"]} == headline["baselines"]
    assert list(rows) == ["verify"]
    assert (rows["verify"]["value"], rows["verify"]["ok"]) == (0.5, False)


def test_every_row_has_the_same_keys(made: Artifact) -> None:
    assert len({tuple(sorted(r)) for r in report.summary_rows(made)}) == 1


def test_the_page_is_self_contained_and_lies_beside_the_stages(made: Artifact, run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert page == made.file("logs/report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|<img|\bsrc=|url\(|@import", page)
    outside = set(re.findall(r"""(?:href|action)=["'](?!#)([^"']+)""", page))
    assert outside == set()
    for word in ("Summary", "Samples", "Training", "Data", "Lineage", "李白", "CC0-1.0", "1,024", "predict"):
        assert word in page, word


def test_equal_inputs_give_an_equal_digest(
    recipe: report.ReportRecipe, made: Artifact, tmp_path: Path
) -> None:
    again = report.run(recipe.model_copy(update={"out": str(tmp_path / "report")}))
    assert again.digest == made.digest


def test_a_report_on_one_artifact_leaves_the_other_sections_out(data: Artifact, tmp_path: Path) -> None:
    made = report.run(report.ReportRecipe(out=str(tmp_path / "report"), data=str(data.path)))
    assert report.summary_rows(made) == []
    page = made.file("logs/report.html").read_text(encoding="utf-8")
    assert "Samples</h2>" not in page
    assert "Data</h2>" in page


def test_a_report_on_nothing_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set at least 'scores'"):
        report.run(report.ReportRecipe(out=str(tmp_path / "report")))


@pytest.fixture
def rewritten(scores: Artifact, tmp_path: Path) -> Callable[..., Artifact]:
    """The scores as a scorer of another schema wrote them."""

    def write(schema: int) -> Artifact:
        told = scores.json("scores.json") | {"schema": schema}
        for row in told["rows"]:
            del row["entities"]

        def body(work: Workspace) -> None:
            work.write_json("scores.json", told)
            work.write_json("samples.json", scores.json("samples.json"))

        return sign(tmp_path / "old", "scores", body)

    return write


@pytest.mark.parametrize("schema", [1, 99])
@pytest.mark.parametrize("field", ["scores", "scores_before"])
def test_scores_of_another_version_are_a_sentence(
    rewritten: Callable[..., Artifact], scores: Artifact, tmp_path: Path, schema: int, field: str
) -> None:
    inputs = {"scores": str(scores.path), field: str(rewritten(schema).path)}
    with pytest.raises(UserError, match=r"old: .*another version.*score again"):
        report.run(report.ReportRecipe(out=str(tmp_path / "report"), **inputs))


def costs(page: str) -> dict[str, str]:
    """The seconds of the report's table of costs, by artifact."""
    table = page[page.index("Time, memory, environment</h2>") :]
    rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")], re.S)
    cells = [[re.sub("<.*?>", "", c) for c in re.findall(r"<td.*?>.*?</td>", r, re.S)] for r in rows]
    return {c[0]: c[2] for c in cells if c}


def test_the_time_of_a_resumed_stage_is_a_dash_and_so_is_the_sum(tmp_path: Path) -> None:
    crash = [True, False]

    def body(work: Workspace) -> None:
        (work.resume / "progress").touch()
        if crash.pop(0):
            raise KeyboardInterrupt

    whole = sign(tmp_path / "data", "data", lambda work: None)
    with pytest.raises(KeyboardInterrupt):
        sign(tmp_path / "sft", "model", body, data=str(whole.path))
    sign(tmp_path / "sft", "model", body, data=str(whole.path))

    def told(**inputs: Path) -> dict[str, str]:
        recipe = report.ReportRecipe(
            out=str(tmp_path / "-".join(inputs)), **{k: str(p) for k, p in inputs.items()}
        )
        return costs(report.run(recipe).file("logs/report.html").read_text(encoding="utf-8"))

    alone = told(data=tmp_path / "data")
    assert alone["total"] == alone["data"] != "–"
    assert told(sft=tmp_path / "sft") == {"data": alone["data"], "sft": "–", "total": "–"}
