"""The best checkpoint: the one that is evaluated is the one that is exported and served, by its digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from artifacts import sign, write_model, write_tokenizer

from microlm.cli.pipeline import resolve
from microlm.cli.run import build_all, run_all
from microlm.core import lineage, manifest, runs
from microlm.core.artifact import Artifact, Workspace, open_artifact
from microlm.core.errors import UserError
from microlm.engine import Engine
from microlm.eval import predict
from microlm.export import hf
from microlm.model import directory
from microlm.text import shards

LOOP = {
    "tokens": 80 * 4 * 64, "context": 64, "batch_rows": 4, "micro_rows": 4, "dtype": "float32",
    "compile": False, "validation_rows": 4, "validation_steps": 8, "keep_best": True,
}  # fmt: skip
RATES = {"embedding_lr": 0.1, "matrix_lr": 0.1, "stable_share": 1.0}


def write_records(work: Workspace) -> None:
    """What is learnt by heart is wrong about what is held out, so that the end is not the best."""
    taught = [("Who was Li Bai?", "A poet of the Tang."), ("Who was Curie?", "A physicist of Warsaw.")]
    held_out = [(ask, other) for (ask, _), (_, other) in zip(taught, reversed(taught), strict=True)]
    for split, pairs, times in (("train", taught, 40), ("validation", held_out, 1)):
        talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
        work.write_jsonl(f"conversations/{split}.jsonl", [{"messages": t} for t in talks] * times)
        work.write_jsonl(f"documents/{split}.jsonl", [{"text": f"{q} {a}"} for q, a in pairs] * times)
    record = {"id": "0", "cate": "", "text": "Li Bai was a poet.", "allowed": ["job"], "lang": "en",
              "relation": [{"head": "Li Bai", "relation": "job", "tail": "poet"}]}  # fmt: skip
    work.write_jsonl("extraction/test.jsonl", [record])
    work.write_json("logs/audit.json", {"from_factbook": []})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Data, tokenizer, shards, model; then a recipe of the command line: tuning, and answers of its best."""
    folder = tmp_path_factory.mktemp("run")
    data = sign(folder / "data", "data", write_records)
    tokenizer = write_tokenizer(folder / "tokenizer", data)
    model = write_model(folder / "base", tokenizer, data)
    made = shards.run(
        shards.TokenizeRecipe(out=str(folder / "shards"), data=data.url, tokenizer=tokenizer.url)
    )
    stages = [
        {"stage": "sft", "model": model.url, "shards": made.url, "loop": LOOP, "optim": RATES},
        {"stage": "predict", "model": "sft/best", "data": data.url, "tasks": ["extraction"],
         "max_tokens": {"extraction": 4}},
    ]  # fmt: skip
    parallel = {"processes": 1, "threads": 1}
    recipe = {"output": str(folder), "parallel": parallel, "stages": stages}
    plan = resolve(recipe, [], lambda stage: ("model", "shards", "data"))
    list(run_all(plan, build_all(plan, "recipe")))
    return open_artifact(str(folder / "sft"))


def best_of(tuned: Artifact) -> Artifact:
    return open_artifact(f"{tuned.url}/best")


def test_the_best_checkpoint_is_a_model_of_its_own(tuned: Artifact) -> None:
    best, told = best_of(tuned), tuned.manifest["metrics"]["best"]
    rows = [json.loads(line) for line in (tuned.path / "logs/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert told["step"] == min(losses, key=losses.__getitem__) < max(losses)
    assert best.digest == told["digest"] != tuned.digest and best.key != tuned.key
    assert best.manifest["checkpoint"] == {
        "name": "best", "of": tuned.digest, "step": told["step"], "validation_loss": told["validation_loss"]
    }  # fmt: skip
    assert best.path == tuned.path / "best" and manifest.damages(best) == {}
    assert directory.load(best.path).config == directory.load(tuned.path).config


def test_what_was_evaluated_is_exported_and_its_digest_told(tuned: Artifact, tmp_path: Path) -> None:
    best, predictions = best_of(tuned), open_artifact(f"{tuned.url}/../predict")
    asked = predictions.manifest["inputs"]["model"]
    assert (asked["digest"], asked["path"]) == (best.digest, "sft/best")
    assert asked["checkpoint"] == best.manifest["checkpoint"]
    empty: dict[str, Any] = {"schema": 1, "headlines": []}
    scores = sign(
        tmp_path / "score", "scores", lambda w: w.write_json("scores.json", empty),
        predictions=str(predictions.path),
    )  # fmt: skip
    made = hf.run(hf.ExportRecipe(out=str(tmp_path / "export"), model=best.url, scores=scores.url))
    assert made.manifest["inputs"]["model"]["digest"] == best.digest
    assert (made.path / "model.safetensors").read_bytes() == (best.path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=rf"the scores are of model {best.digest[:12]}.*{tuned.digest[:12]}"):
        hf.run(hf.ExportRecipe(out=str(tmp_path / "other"), model=tuned.url, scores=scores.url))


def test_its_lineage_is_that_of_the_model(tuned: Artifact) -> None:
    found = lineage.tree(f"{tuned.url}/../predict")
    nodes = {node.name: node for node in found.walk()}
    assert set(nodes) == {"predict", "best", "data", "base", "shards", "tokenizer"}
    assert lineage.is_intact([found]) and not any(node.notes for node in nodes.values())
    with pytest.raises(UserError, match="was made from it; remove that first"):
        runs.remove("sft", tuned.path.parent)


def test_a_changed_byte_of_it_is_found(tuned: Artifact, tmp_path: Path) -> None:
    weights = tuned.path / "best" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        assert manifest.damages(best_of(tuned)) == {"model.safetensors": "changed"}
        recipe = predict.PredictRecipe(
            out=str(tmp_path / "p"), model=best_of(tuned).url, data=f"{tuned.url}/../data"
        )
        with pytest.raises(UserError, match=r"best/model\.safetensors: changed since the manifest"):
            predict.run(recipe)
    finally:
        weights.write_bytes(before)


def test_other_folders_of_an_artifact_are_none(tuned: Artifact) -> None:
    assert [manifest.find(f"{tuned.url}/{name}") for name in ("logs", "worst", "best/logs")] == [None] * 3
    with pytest.raises(UserError, match=r"logs: no manifest\.json there"):
        open_artifact(f"{tuned.url}/logs")


def test_the_engine_serves_it(tuned: Artifact) -> None:
    found = Engine(best_of(tuned).path, max_seqs=1)
    assert manifest.find(str(found.directory)).digest == best_of(tuned).digest  # type: ignore[union-attr]
