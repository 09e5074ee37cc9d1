"""Baselines answer what can be worked out by hand, and nothing where there is nothing to learn from."""

from __future__ import annotations

import pytest

from microlm.core.records import Extraction, Question, Triple
from microlm.eval import baselines
from microlm.eval.wordings import HEAD, TAIL, count, learn, tokenise, windows

ALLOWED = ("出生地点", "职业")
NAMES = ["王一", "李二", "张三", "赵四", "陈五"]
PLACES = ["临清", "永安", "长兴", "新泰", "宁阳"]
JOBS = ["画家", "医生", "教师", "律师", "演员"]


def record(text: str, *triples: tuple[str, str, str]) -> Extraction:
    return Extraction("x", "人物", text, tuple(Triple(*t) for t in triples), ALLOWED)


TRAIN = [
    record(f"{n}出生在{p}，他的职业是{j}。", (n, "出生地点", p), (n, "职业", j))
    for n, p, j in zip(NAMES, PLACES, JOBS, strict=True)
]
QUESTIONS = [
    Question(f"p{i}", f"{n}出生在哪里？", p) for i, (n, p) in enumerate(zip(NAMES, PLACES, strict=True))
]
QUESTIONS += [
    Question(f"j{i}", f"{n}的职业是什么？", j) for i, (n, j) in enumerate(zip(NAMES, JOBS, strict=True))
]


def test_wordings_are_masked_clauses() -> None:
    found = learn(count(TRAIN), at_least=3, most=9)
    assert [w.tokens for w in found["出生地点"]] == [(HEAD, "出", "生", "在", TAIL)]
    assert [w.tokens for w in found["职业"]] == [("他", "的", "职", "业", "是", TAIL)]


def test_windows_are_clauses_and_neighbours_within_a_sentence() -> None:
    assert windows("甲，乙。丙") == [((0, 1), "甲"), ((0, 2), "甲，乙"), ((1, 2), "乙"), ((2, 3), "丙")]
    assert [w for _, w in windows("It is 3.5 or 1,000 km. Yes")] == ["It is 3.5 or 1,000 km", "Yes"]


@pytest.mark.parametrize("name", baselines.NAMES)
def test_a_training_wording_is_read_with_new_names_and_a_pronoun(name: str) -> None:
    text = record("诸葛明出生在云溪县，他的职业是木匠。")
    expected = {("诸葛明", "出生地点", "云溪县"), ("诸葛明", "职业", "木匠")}
    assert baselines.extractors(TRAIN)[name](text) == expected


def test_only_the_nearest_template_reads_a_changed_wording() -> None:
    text = record("诸葛明出生就在云溪县。")
    found = {name: extract(text) for name, extract in baselines.extractors(TRAIN).items()}
    assert found == {"regex": frozenset(), "nearest_template": {("诸葛明", "出生地点", "云溪县")}}


@pytest.mark.parametrize("name", baselines.NAMES)
def test_relations_that_are_not_asked_for_and_foreign_texts_give_nothing(name: str) -> None:
    extract = baselines.extractors(TRAIN)[name]
    assert extract(Extraction("x", "人物", "诸葛明出生在云溪县。", (), ("职业",))) == frozenset()
    assert extract(record("Nothing of this kind stands here.")) == frozenset()


def test_alignment_by_hand() -> None:
    wording = (HEAD, "出", "生", "在", TAIL)
    score, head, tail = baselines.align(tokenise("诸葛明出生在云溪"), wording)
    assert (head, tail) == ("诸葛明", "云溪")
    assert score == pytest.approx(3 - 0.1 * 5)
    score, head, tail = baselines.align(tokenise("诸葛明出在云溪"), wording)
    assert (head, tail) == ("诸葛明", "云溪")
    assert score == pytest.approx(2 - 0.5 - 0.1 * 5)
    assert baselines.align(tokenise("甲"), wording)[0] < 0


@pytest.mark.parametrize("name", baselines.NAMES)
def test_questions_are_answered_from_training_questions(name: str) -> None:
    answer = baselines.answerers(QUESTIONS, NAMES)[name]
    assert answer("请问张三出生在什么地方？") == "长兴"
    assert answer("张三的职业叫什么？") == "教师"
    assert answer("") == ""


@pytest.mark.parametrize("name", baselines.NAMES)
def test_nothing_to_learn_from_answers_nothing(name: str) -> None:
    assert baselines.answerers([], [])[name]("张三出生在哪里？") == ""
    assert baselines.extractors([])[name](TRAIN[0]) == frozenset()


def test_the_same_training_data_in_another_process_order_gives_the_same_answers() -> None:
    for name in baselines.NAMES:
        once = [sorted(baselines.extractors(TRAIN)[name](r)) for r in TRAIN]
        assert once == [sorted(baselines.extractors(list(TRAIN))[name](r)) for r in TRAIN]
