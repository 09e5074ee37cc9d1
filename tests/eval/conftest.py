"""One small run for all tests of this room: data, model, predictions, scores."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_data import write_small_data, write_small_model

from microlm.core.artifact import Artifact
from microlm.eval import predict, score


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small-run")


@pytest.fixture(scope="session")
def data(run_dir: Path) -> Artifact:
    return write_small_data(run_dir / "data")


@pytest.fixture(scope="session")
def model(run_dir: Path, data: Artifact) -> Artifact:
    return write_small_model(run_dir / "model", data)


@pytest.fixture(scope="session")
def predict_recipe(run_dir: Path, model: Artifact, data: Artifact) -> predict.PredictRecipe:
    caps = predict.MaxTokens(question=4, extraction=24, chat=4)
    return predict.PredictRecipe(
        out=str(run_dir / "predict"),
        model=str(model.path),
        data=str(data.path),
        max_tokens=caps,
        batch_rows=4,
    )


@pytest.fixture(scope="session")
def predictions(predict_recipe: predict.PredictRecipe) -> Artifact:
    return predict.run(predict_recipe)


@pytest.fixture(scope="session")
def score_recipe(run_dir: Path, predictions: Artifact, data: Artifact) -> score.ScoreRecipe:
    gates = score.Gates(question_exact=0.75, constrained_valid=0.0)
    return score.ScoreRecipe(
        out=str(run_dir / "score"), predictions=str(predictions.path), data=str(data.path), gates=gates
    )


@pytest.fixture(scope="session")
def scores(score_recipe: score.ScoreRecipe) -> Artifact:
    return score.run(score_recipe)
