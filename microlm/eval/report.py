"""Stage `report`: everything a run left → one self-contained page, and the few rows that the terminal shows.

Enters: the run's artifacts. Leaves: summary.json (equal for equal runs), logs/report.html with a
copy beside the stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from microlm.core import lineage, storage
from microlm.core.artifact import Artifact, Workspace, open_artifact, stage
from microlm.core.errors import UserError
from microlm.core.recipe import StageRecipe, artifact_input
from microlm.eval import report_page, scoring
from microlm.eval.baselines import NAMES

SCHEMA = 1


class ReportRecipe(StageRecipe):
    """What is reported on; ancestors of these are found by themselves."""

    scores: str | None = artifact_input(
        None, kinds=("scores",), description="scores of the model that is exported"
    )
    scores_before: str | None = artifact_input(
        None, kinds=("scores",), description="scores of an earlier checkpoint, beside it"
    )
    verify: str | None = artifact_input(None, kinds=("verdict",), description="verdict on the served model")
    export: str | None = artifact_input(None, kinds=("model",), description="exported model")
    data: str | None = artifact_input(None, kinds=("data",), description="data artifact")
    tokenizer: str | None = artifact_input(None, kinds=("tokenizer",), description="tokenizer artifact")
    pretrain: str | None = artifact_input(None, kinds=("model",), description="pretrained model")
    sft: str | None = artifact_input(None, kinds=("model",), description="tuned model")
    lora: str | None = artifact_input(None, kinds=("adapter",), description="adapter artifact")
    merge: str | None = artifact_input(None, kinds=("model",), description="merged model")


@stage("report", kind="report", version=2)
def run(recipe: ReportRecipe, work: Workspace) -> None:
    """Collect, summarise, write the page."""
    if not work.inputs:
        raise UserError("report: no input is named; set at least 'scores' to a scores artifact")
    history = reachable(work.inputs)
    rows = summarise(work.inputs)
    work.write_json("summary.json", {"schema": SCHEMA, "rows": rows})
    page = report_page.build(rows, work.inputs, history).html()
    work.write_text("logs/report.html", page)
    if not storage.is_remote(work.out):
        beside = storage.local_path(storage.parent(work.out)) / "report.html"
        storage.write_atomic(beside, page.encode())


def summary_rows(artifact: Artifact) -> list[dict[str, Any]]:
    """A report's rows: name, kind, value, low, high, n, unit, gate, ok, the baselines by name, before."""
    rows: list[dict[str, Any]] = artifact.json("summary.json")["rows"]
    return rows


def reachable(inputs: Mapping[str, Artifact]) -> list[Artifact]:
    """The inputs and all that they were made from, each once, in the order in which they were made."""
    nodes = [lineage.tree(a.url, verify=False) for a in inputs.values()]
    urls = {part.url for node in nodes for part in node.walk() if part.digest}
    return sorted(map(open_artifact, urls), key=lambda a: (a.manifest["times"]["finished"], a.url))


def summarise(inputs: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """One row for each headline score, then one for the verdict."""
    rows: list[dict[str, Any]] = []
    if scores := inputs.get("scores"):
        rows += _score_rows(_read_scores(scores), inputs.get("scores_before"))
    if verdict := inputs.get("verify"):
        found = verdict.json("verdict.json")
        judged = found["passed"] + found["failed"]
        share = found["passed"] / judged if judged else None
        row = {
            "name": "verify",
            "kind": "all",
            "value": share,
            "low": None,
            "high": None,
            "n": judged,
            "unit": "share",
        }
        rows.append({**row, "gate": 1.0, "ok": found["failed"] == 0, **dict.fromkeys((*NAMES, "before"))})
    return rows


def _read_scores(artifact: Artifact) -> Mapping[str, Any]:
    scores: Mapping[str, Any] = artifact.json("scores.json")
    if scores["schema"] != scoring.SCHEMA:
        raise UserError(f"{artifact.url}: these scores were made by another version of MicroLM; score again")
    return scores


def _score_rows(scores: Mapping[str, Any], before: Artifact | None) -> list[dict[str, Any]]:
    gates = {g["gate"]: g for g in scores["gates"]}
    earlier = {h["name"]: h["value"] for h in _read_scores(before)["headlines"]} if before else {}
    rows = []
    for h in scores["headlines"]:
        row = {key: h[key] for key in ("name", "kind", "value", "low", "high", "n", "unit")}
        gate = gates.pop(h["name"], {})
        row |= {"gate": gate.get("limit"), "ok": gate.get("ok"), **h["baselines"]}
        rows.append({**row, "before": earlier.get(h["name"])})
    for name, gate in gates.items():  # asked for, never measured
        empty = dict.fromkeys(("kind", "value", "low", "high", "n", "unit", *NAMES, "before"))
        rows.append({"name": name, **empty, "gate": gate["limit"], "ok": False})
    return rows
