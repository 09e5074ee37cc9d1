"""Re-scoring = the same bytes, without a model; a gate that is missed says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifacts import sign
from small_data import PEOPLE, write_small_data

from microlm.core import stats
from microlm.core.artifact import Artifact, Workspace
from microlm.core.errors import CheckFailed, UserError
from microlm.core.records import Extraction, Prediction, Question, Triple, to_json
from microlm.eval import rows, score
from microlm.text.extraction import Bounds
from microlm.text.sources import factbook


def write_predictions(out: Path, data: Artifact, predictions: list[Prediction]) -> Artifact:
    """Predictions made by hand."""

    def body(work: Workspace) -> None:
        work.write_jsonl("predictions.jsonl", [to_json(p) for p in predictions])

    return sign(out, "predictions", body, data=str(data.path))


def by_hand() -> list[Prediction]:
    """4 of 5 questions right; extraction of 3 right, one wrong value, one cut off; 5 of 6 chats stop."""
    kinds = ["specific" if i % 2 else "generic" for i in range(5)]
    answers = [*list(PEOPLE.values())[:4], "清朝"]
    made = [Prediction(f"q-{kinds[i]}-{i}", "question", "", a, "stop") for i, a in enumerate(answers)]
    outputs = [f'{{"{n}":{{"朝代":"{e}"}}}}' for n, e in PEOPLE.items()]
    outputs[3], outputs[4] = '{"关汉卿":{"朝代":"清朝"}}', '{"徐霞客":{"朝'
    names = [f"x-{'mixed' if i % 2 else 'generic'}-{i}" for i in range(5)]
    ends = ["stop"] * 4 + ["length"]
    made += [Prediction(n, "extraction", "", o, e) for n, o, e in zip(names, outputs, ends, strict=True)]
    made += [Prediction(f"chat-{i}", "chat", "", "好", "stop" if i else "length") for i in range(6)]
    return made


def values(scores: Artifact) -> dict[tuple[str, str, str], float]:
    return {(r["name"], r["kind"], r["lang"]): r["value"] for r in scores.json("scores.json")["rows"]}


def test_scoring_again_gives_the_same_bytes(
    score_recipe: score.ScoreRecipe, scores: Artifact, tmp_path: Path
) -> None:
    again = score.run(score_recipe.model_copy(update={"out": str(tmp_path / "again")}))
    assert again.digest == scores.digest
    for name in ("scores.json", "samples.json"):
        assert again.file(name).read_bytes() == scores.file(name).read_bytes()


def test_scores_equal_those_worked_out_by_hand(data: Artifact, tmp_path: Path) -> None:
    made = write_predictions(tmp_path / "p", data, by_hand())
    recipe = score.ScoreRecipe(out=str(tmp_path / "s"), predictions=str(made.path), data=str(data.path))
    found = values(score.run(recipe))
    expected = {
        ("question_exact", "all", "all"): 4 / 5,
        ("question_exact", "generic", "all"): 2 / 3,
        ("question_exact", "specific", "all"): 1,
        ("extraction_f1", "all", "all"): 2 * 3 / (4 + 5),
        ("extraction_f1", "mixed", "all"): 2 * 1 / (2 + 2),
        ("extraction_f1", "generic", "zh"): 1,
        ("extraction_f1", "all", "en"): 0,
        ("extraction_precision", "all", "all"): 3 / 4,
        ("extraction_recall", "all", "all"): 3 / 5,
        ("extraction_entity_f1", "all", "all"): 2 * 4 / (4 + 5),
        ("extraction_unsupported", "all", "all"): 1 / 4,
        ("extraction_parsed", "all", "all"): 4 / 5,
        ("extraction_schema_valid", "all", "all"): 4 / 5,
        ("extraction_truncated", "all", "all"): 1 / 5,
        ("eos", "all", "all"): 5 / 6,
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected, abs=1e-6)
    assert not any(name.startswith("bits") or "constrained" in name for name, _, _ in found)


def test_intervals_hold_their_values_and_baselines_stand_beside(scores: Artifact) -> None:
    told = scores.json("scores.json")
    for row in [*told["rows"], *told["baselines"]]:
        assert row["low"] <= row["value"] <= row["high"], row
        assert row["n"] > 0
    assert {b["by"] for b in told["baselines"]} == {"regex", "nearest_template"}
    headlines = {h["name"]: h for h in told["headlines"]}
    assert headlines["extraction_f1"]["kind"] == "mixed"
    assert set(headlines["extraction_f1"]["baselines"]) == {"regex", "nearest_template"}
    assert headlines["constrained_valid"]["value"] == 1.0 or headlines["constrained_valid"]["n"] == 5


def scored(entity: str, outcome: tuple[int, int, int], kind: str = "mixed", source: str = "") -> score.Scored:
    return score.Scored(kind, "zh", tuple(entity.split()), outcome, source)


OUTCOMES = {"李白": (1, 2, 2), "苏轼": (3, 3, 3), "张衡": (0, 1, 2), "关汉卿": (2, 3, 2)}


def test_the_same_item_asked_again_of_the_same_entity_adds_no_certainty() -> None:
    once = [scored(name, counts) for name, counts in OUTCOMES.items()]
    for row, again in zip(score.f1_rows(once), score.f1_rows(once * 25), strict=True):
        assert (again.value, again.low, again.high) == (row.value, row.low, row.high)
        assert (row.n, again.n, row.entities, again.entities) == (4, 100, 4, 4)
    apart = [scored(f"{name}{i}", counts) for i in range(25) for name, counts in OUTCOMES.items()]
    wide, narrow = score.f1_rows(once * 25)[0], score.f1_rows(apart)[0]
    assert narrow.high - narrow.low < (wide.high - wide.low) / 2
    assert score.by_entity(once * 2) == [(2 * a, 2 * b, 2 * c) for a, b, c in OUTCOMES.values()]


def test_items_that_share_an_entity_through_others_stand_together() -> None:
    chain = ["李白 杜甫", "王维", "苏轼 杜甫", "苏轼", "张衡 苏轼", "王维"]
    for order in (chain, chain[::-1], sorted(chain)):
        assert sorted(score.by_entity([scored(names, (1, 1, 2)) for names in order])) == [
            (2, 2, 4),
            (4, 4, 8),
        ]


def test_a_record_is_about_every_head_of_its_gold() -> None:
    def record(name: str, *heads: str) -> Extraction:
        triples = tuple(Triple(h, "朝代", "唐朝") for h in heads)
        return Extraction(name, "", "", triples, ("朝代",), kind="mixed")

    records = {
        "a": record("a", "李白", "杜甫"),
        "b": record("b", "王维", "杜甫"),
        "c": record("c"),
        "d": record("d"),
    }
    made = [Prediction(k, "extraction", "", "{}", "stop") for k in records]
    row = score.score_predictions(made, score.Gold({}, records, Bounds()))[0]
    assert (row.name, row.n, row.entities) == ("extraction_f1", 4, 3)


def ask(right: int, times: int) -> rows.Row:
    """Five entities, each asked `times` times, the first `right` of them always answered rightly."""
    names = list(PEOPLE)
    questions = {
        f"{n}-{i}": Question(f"{n}-{i}", "", PEOPLE[n], "specific", entity=n)
        for i in range(times)
        for n in names
    }
    made = [
        Prediction(k, "question", "", q.answer if names.index(q.entity) < right else "", "stop")
        for k, q in questions.items()
    ]
    return score.score_predictions(made, score.Gold(questions, {}, Bounds()))[0]


@pytest.mark.parametrize("right", [0, 5])
def test_questions_that_all_agree_count_as_many_as_their_entities(right: int) -> None:
    row = ask(right, 60)
    assert (row.value, row.low, row.high) == pytest.approx(stats.proportion_ci(right, 5), abs=1e-6)
    assert (row.n, row.entities) == (300, 5)


def test_questions_about_one_entity_stand_or_fall_together() -> None:
    alone, often = ask(3, 1), ask(3, 60)
    assert alone.value == often.value == 0.6
    assert (alone.low, alone.high) == pytest.approx(stats.proportion_ci(3, 5)[1:], abs=1e-6)
    assert often.high - often.low > 0.5  # 300 independent items would give 0.11


def test_real_and_invented_entities_are_told_apart() -> None:
    sources = {
        "李白": factbook.REAL,
        "苏轼": factbook.REAL,
        "张衡": factbook.INVENTED,
        "关汉卿": "my.jsonl:4",
    }
    rows = score.f1_rows([scored(n, c, source=sources[n]) for n, c in OUTCOMES.items()])
    values = {(r.name, r.kind): r.value for r in rows}
    assert values == {
        ("extraction_f1", "all"): pytest.approx(2 * 6 / (9 + 9)),
        ("extraction_f1", "mixed"): pytest.approx(2 * 6 / (9 + 9)),
        ("extraction_f1_real", "all"): pytest.approx(2 * 4 / (5 + 5)),
        ("extraction_f1_real", "mixed"): pytest.approx(2 * 4 / (5 + 5)),
        ("extraction_f1_invented", "all"): 0.0,
        ("extraction_f1_invented", "mixed"): 0.0,
    }
    assert not any("real" in r.name for r in score.f1_rows([scored("李白", (1, 1, 1), source="my.jsonl:1")]))


def test_one_entity_tells_nothing_of_others() -> None:
    row = score.f1_rows([scored("李白", (1, 2, 2))] * 9)[0]
    assert (row.value, row.low, row.high) == (0.5, 0.0, 1.0)


def test_gates_are_recorded_and_fail_on_demand(data: Artifact, tmp_path: Path) -> None:
    made = write_predictions(tmp_path / "p", data, by_hand())
    gates = score.Gates(question_exact=0.8, extraction_f1=0.6, constrained_valid=1.0)
    recipe = score.ScoreRecipe(
        out=str(tmp_path / "s"), predictions=str(made.path), data=str(data.path), gates=gates, baselines=False
    )
    told = score.run(recipe)
    assert [(g["gate"], g["ok"]) for g in told.json("scores.json")["gates"]] == [
        ("question_exact", True),
        ("extraction_f1", False),
        ("constrained_valid", False),  # nobody measured it
    ]
    assert len(told.manifest["metrics"]["gates_missed"]) == 2
    strict = recipe.model_copy(update={"out": str(tmp_path / "strict"), "fail_on_gate": True})
    with pytest.raises(CheckFailed, match=r"extraction_f1 is 0\.5, the limit is 0\.6"):
        score.run(strict)


def test_other_data_than_was_predicted_from_is_refused(predictions: Artifact, tmp_path: Path) -> None:
    other = write_small_data(tmp_path / "data")
    changed = sign(tmp_path / "changed", "data", lambda work: work.write_text("a", "b"))
    same = score.ScoreRecipe(out=str(tmp_path / "s"), predictions=str(predictions.path), data=str(other.path))
    assert score.run(same)  # equal bytes elsewhere are the same data
    foreign = same.model_copy(update={"out": str(tmp_path / "t"), "data": str(changed.path)})
    with pytest.raises(UserError, match="predicted from other data"):
        score.run(foreign)


def test_samples_are_the_first_right_and_wrong_by_id(data: Artifact, tmp_path: Path) -> None:
    made = write_predictions(tmp_path / "p", data, by_hand())
    recipe = score.ScoreRecipe(out=str(tmp_path / "s"), predictions=str(made.path), data=str(data.path))
    chosen = score.run(recipe).json("samples.json")["samples"]
    asked = [(s["id"], s["right"]) for s in chosen if s["task"] == "question"]
    assert asked == [
        ("q-generic-0", True),
        ("q-generic-2", True),
        ("q-specific-1", True),
        ("q-generic-4", False),
    ]
    assert next(s for s in chosen if s["id"] == "q-generic-4")["gold"] == "明朝"


def test_bits_by_source_add_up_to_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    sources = ["a"] * 6 + ["b"] * 5 + ["c", "d"]
    documents = [{"source": s, "bits": 10.0 + i, "bytes": 7 + i} for i, s in enumerate(sources)]
    file.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    found = {r.kind: r for r in rows.score_documents(file)}
    assert list(found) == ["all", "a", "b", "other sources"]
    for kind, members in (("all", documents), ("a", documents[:6]), ("other sources", documents[11:])):
        expected = sum(d["bits"] for d in members) / sum(d["bytes"] for d in members)
        assert found[kind].value == pytest.approx(expected, abs=1e-6) and found[kind].n == len(members)
    file.write_text(json.dumps(documents[0]) + "\n", encoding="utf-8")
    assert [r.kind for r in rows.score_documents(file)] == ["all"]
