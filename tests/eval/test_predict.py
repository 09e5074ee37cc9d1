"""Bits per byte = computed from the decoder's logits; equal runs = equal bytes; endpoint = engine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from artifacts import sign
from hypothesis import given
from hypothesis import strategies as st
from serving import run_model
from small_data import DOCUMENTS, extraction

from microlm.core.artifact import Artifact, Workspace
from microlm.core.records import Extraction, Message, Prediction, Question, Sampling, to_json
from microlm.eval import predict, report, score
from microlm.eval.predictor import EndpointPredictor, EnginePredictor, Item, cut
from microlm.eval.scoring import conforms
from microlm.model import directory
from microlm.text import extraction as form
from microlm.text.read import read_records


def rows(predictions: Artifact) -> list[Prediction]:
    return list(read_records(predictions.file("predictions.jsonl"), Prediction))


@given(length=st.integers(0, 200), window=st.integers(2, 50))
def test_windows_score_each_token_but_the_first_once(length: int, window: int) -> None:
    scored = []
    for start, end, new in cut(length, window):
        assert 0 <= start < end - new + 1 <= end <= length
        assert end - start <= window
        assert end - new > start  # every new token has something before it
        scored += range(end - new, end)
    assert scored == list(range(1, length))


def test_bits_equal_a_direct_computation_from_logits(model: Artifact, predictions: Artifact) -> None:
    decoder = directory.load(model.path)
    tokenizer = EnginePredictor(model.path, batch_rows=1).engine.tokenizer
    saved = [json.loads(line) for line in predictions.file("documents.jsonl").read_text().splitlines()]
    window = decoder.config.max_position_embeddings
    assert len(saved) == len(DOCUMENTS)
    for row, text in zip(saved, DOCUMENTS, strict=True):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        bits = 0.0
        for start, end, new in cut(len(ids), window):
            with torch.no_grad():
                known = decoder(torch.tensor([ids[start:end]]))[0].double().log_softmax(-1)
            for at in range(end - new, end):
                bits -= float(known[at - start - 1, ids[at]]) / math.log(2)
        assert row["bits"] == pytest.approx(bits, rel=1e-4)
        assert row["bytes"] == len(text.encode()) - 1  # this tokenizer's tokens are bytes
        assert row["tokens"] == len(ids) - 1
    assert saved[-1]["tokens"] > window  # the long document needed several windows


def test_equal_recipes_give_equal_bytes(
    predict_recipe: predict.PredictRecipe, predictions: Artifact, tmp_path: Path
) -> None:
    again = predict.run(predict_recipe.model_copy(update={"out": str(tmp_path / "again")}))
    assert again.digest == predictions.digest


def test_rows_are_sorted_and_complete(predictions: Artifact) -> None:
    found = rows(predictions)
    assert [(r.task, r.id) for r in found] == sorted((r.task, r.id) for r in found)
    counts = {task: sum(r.task == task for r in found) for task in {r.task for r in found}}
    assert counts == {"question": 5, "extraction": 5, "extraction_constrained": 5, "chat": 6}
    assert [r.extra["before"] for r in found if "before" in r.extra] == [
        [{"role": "user", "content": "你好，李白"}, {"role": "assistant", "content": "你好"}]
    ]
    assert {r.finish_reason for r in found} <= {"stop", "length"}


def test_limits_draw_the_same_items_for_another_model(
    predict_recipe: predict.PredictRecipe, data: Artifact
) -> None:
    few = predict_recipe.model_copy(update={"limits": predict.Limits(questions=1, extraction=1, chats=2)})
    asked = [i.id for i in predict.items_of(few, data, "question")]
    assert len(asked) == 2  # one of each kind
    assert asked == [i.id for i in predict.items_of(few, data, "question")]
    assert len(predict.items_of(few, data, "chat")) == 2
    everything = predict_recipe.model_copy(update={"limits": predict.Limits(questions=None)})
    assert len(predict.items_of(everything, data, "question")) == 5


def test_a_second_record_of_an_id_gets_a_name_of_its_own() -> None:
    found = predict.named([Question("a", "1", "x"), Question("b", "2", "x"), Question("a", "3", "x")])
    assert {k: q.question for k, q in found.items()} == {"a": "1", "b": "2", "a#2": "3"}


def test_a_prompt_beyond_the_window_is_an_error_of_that_item_only(model: Artifact) -> None:
    predictor = EnginePredictor(model.path, batch_rows=2)
    sampling = Sampling(max_tokens=3)
    items = [Item("long", "raw", "字" * 900, sampling), Item("short", "raw", "abc", sampling)]
    heard: list[int] = []
    long, short = predictor.predict(items, heard.append)
    assert long.finish_reason == "error"
    assert "2700 tokens" in long.error
    assert short.finish_reason in ("stop", "length")
    assert sum(heard) == 2


def test_endpoint_and_engine_give_the_same_texts(model: Artifact) -> None:
    sampling = Sampling(max_tokens=8)
    items = [Item(str(i), "chat", (Message("user", f"hello {i}"),), sampling) for i in range(5)]
    items.append(Item("raw", "raw", "abc", sampling))
    items.append(Item("long", "raw", "字" * 900, sampling))
    expected = EnginePredictor(model.path, batch_rows=4).predict(items)
    with run_model(model.path) as server:
        predictor = EndpointPredictor(server.url)
        found = predictor.predict(items)
        assert predictor.bits(["李白"]) is None
    assert [(c.text, c.finish_reason) for c in found] == [(c.text, c.finish_reason) for c in expected]
    assert [c.prompt_tokens for c in found[:6]] == [c.prompt_tokens for c in expected[:6]]
    assert found[-1].error


@pytest.fixture
def wide(tmp_path: Path) -> Artifact:
    """The training split has a long name and many triples; the test one answer that is longer still."""
    long = extraction(0, "长" * 80, "明朝", "", "mixed")
    many = extraction(1, "李白", "唐朝", "", "mixed")
    many["relation"] = [
        many["relation"][0] | {"head": f"人{i}", "tail": f"朝{j}"} for i in range(5) for j in range(6)
    ]
    longer = extraction(2, "长" * 81, "明朝", "", "mixed")

    def body(work: Workspace) -> None:
        work.write_jsonl("extraction/train.jsonl", [long, many])
        work.write_jsonl("extraction/test.jsonl", [long, many, longer])
        work.write_jsonl("questions/test.jsonl", [])

    return sign(tmp_path / "data", "data", body)


def test_a_schema_is_as_wide_as_the_training_answers(
    predict_recipe: predict.PredictRecipe, wide: Artifact
) -> None:
    items = predict.items_of(predict_recipe, wide, "extraction_constrained")
    records = list(read_records(wide.file("extraction/test.jsonl"), Extraction))
    fits = [
        conforms(json.loads(form.answer(r.relation, r.allowed)), json.loads(i.sampling.constraint.value))
        for i, r in zip(items, records, strict=True)
    ]
    assert fits == [True, True, False]


def test_copied_extraction_is_bound_to_the_text(
    predict_recipe: predict.PredictRecipe, wide: Artifact
) -> None:
    records = list(read_records(wide.file("extraction/test.jsonl"), Extraction))
    recipe = predict_recipe.model_copy(update={"copied": True})
    items = predict.items_of(recipe, wide, "extraction_constrained")
    assert [i.sampling.constraint.copy_from for i in items] == [r.text for r in records]
    plain = predict.items_of(predict_recipe, wide, "extraction_constrained")
    assert {i.sampling.constraint.copy_from for i in plain} == {None}
    assert [i.prompt for i in plain] == [i.prompt for i in items]


def test_answers_that_no_schema_admits_are_counted(wide: Artifact, tmp_path: Path) -> None:
    names = [f"x-mixed-{i}" for i in range(3)]
    made = [Prediction(n, "extraction_constrained", "", "{}", "stop") for n in names]
    made.append(Prediction(names[2], "extraction", "", "{}", "stop"))

    def body(work: Workspace) -> None:
        work.write_jsonl("predictions.jsonl", [to_json(p) for p in made])

    answers = sign(tmp_path / "predictions", "predictions", body, data=str(wide.path))
    recipe = score.ScoreRecipe(
        out=str(tmp_path / "s"), predictions=str(answers.path), data=str(wide.path), baselines=False
    )
    scores = score.run(recipe)
    assert scores.json("scores.json")["gold_beyond_schema"] == 1
    made_of = report.ReportRecipe(out=str(tmp_path / "report"), scores=str(scores.path))
    page = report.run(made_of).file("logs/report.html").read_text(encoding="utf-8")
    assert "1 of the 3 gold answers" in page
