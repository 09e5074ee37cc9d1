"""The factbook: the same world for the same seed, gold that stands in its text, a test apart."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.core.records import Extraction, to_json
from microlm.text import extraction as form
from microlm.text.clean import tidy
from microlm.text.sources.factbook import (
    INVENTED,
    REAL,
    SOURCE,
    Factbook,
    FactbookSizes,
    generate,
    split_entities,
    tables,
)
from microlm.text.sources.factbook.fiction import Composer
from microlm.text.sources.factbook.tables import Lang, Tables, Wordings
from microlm.text.sources.factbook.tasks import Maker
from microlm.text.sources.factbook.wording import relation_name

SMALL: dict[str, Any] = {
    "documents": 300, "questions": 400, "extraction": 600, "reading": 120, "chat": 60, "preferences": 40,
    "test_questions": 40, "test_extraction": 60, "test_chats": 40, "english_share": 0.2,
}  # fmt: skip
LANGS: tuple[Lang, Lang] = ("zh", "en")


@cache
def world() -> Tables:
    return tables.load()


@cache
def small(seed: int = 0, entities: str | None = None) -> Factbook:
    return generate(seed, entities, FactbookSizes(**SMALL))


def digest(book: Factbook) -> str:
    parts = [*vars(book).values()]
    rows = [[to_json(r) if hasattr(r, "__dataclass_fields__") else str(r) for r in p] for p in parts]
    return hashlib.sha256(json.dumps([rows, book.schema], ensure_ascii=False).encode()).hexdigest()


def training_texts(book: Factbook) -> Iterator[str]:
    yield from (d.text for d in book.documents)
    yield from (m.content for c in book.conversations for m in c.messages)
    yield from (e.text for e in book.extraction_train)
    yield from (q.question for q in book.questions_train)
    yield from (m.content for p in book.preferences for m in p.prompt)


def all_extraction(book: Factbook) -> list[Extraction]:
    return [*book.extraction_train, *book.extraction_test]


# --- the tables


def test_the_tables_are_as_large_as_promised() -> None:
    book = world()
    assert len(book.topics) == 12
    counts = Counter(e.topic for e in book.entities if e.lang == "zh")
    assert set(counts) == set(book.topics)
    assert min(counts.values()) >= 25
    for entity in book.entities:
        assert 4 <= len(entity.facts) <= 8 or entity.lang == "en", entity.name
        assert set(entity.facts) <= set(book.topics[entity.topic].relations)
        assert entity.name not in entity.facts.values()


def test_a_name_that_stands_in_two_topics_says_the_same_in_both() -> None:
    facts: dict[tuple[str, str, str], str] = {}
    for entity in world().entities:
        for relation, value in entity.facts.items():
            assert facts.setdefault((entity.lang, entity.name, relation), value) == value, entity.name


def wordings() -> Iterator[tuple[str, Wordings, Wordings]]:
    """(place, a relation's own wordings, the generic ones of its language)."""
    book = world()
    for topic in book.topics.values():
        for relation in topic.relations.values():
            for lang in LANGS:
                generic = book.generic[lang]
                shared = Wordings(*(tuple(generic[f]) for f in Wordings.__dataclass_fields__))
                yield f"{topic.name}/{relation.name}/{lang}", getattr(relation, lang), shared


def test_every_wording_has_its_braces() -> None:
    for place, own, shared in wordings():
        for words, marks in ((own, ""), (shared, "{r}")):
            for statement in (*words.statements, *words.statements_held_out):
                assert [statement.count(m) for m in ("{e}", "{v}")] == [1, 1], f"{place}: {statement}"
                assert marks in statement
            for question in (*words.questions, *words.questions_held_out):
                assert [question.count(m) for m in ("{e}", "{v}")] == [1, 0], f"{place}: {question}"
                assert marks in question
        assert own.statements_held_out, place
        assert own.questions_held_out, place


def test_no_held_out_wording_is_part_of_a_training_wording() -> None:
    for place, own, shared in wordings():
        train = [*own.statements, *own.questions, *shared.statements, *shared.questions]
        held = [*own.statements_held_out, *own.questions_held_out]
        held += [*shared.statements_held_out, *shared.questions_held_out]
        for wording in held:
            assert not any(wording.strip("。？?. ") in t for t in train), f"{place}: {wording}"


def test_every_relation_can_be_invented() -> None:
    book = world()
    composer = Composer(book, runtime.rng(0, "test"))
    for topic in book.topics.values():
        assert len({r.name_en for r in topic.relations.values()}) == len(topic.relations)
        for lang in LANGS:
            entity = composer.entity(topic, lang, 99)
            assert len(entity.facts) >= len(topic.relations) - 1
            assert all(v.strip() and "{" not in v for v in (entity.name, *entity.facts.values()))


# --- what is composed


def test_equal_seeds_equal_records() -> None:
    assert digest(small()) == digest(generate(0, None, FactbookSizes(**SMALL)))
    assert digest(small()) != digest(small(1))


@pytest.mark.slow
def test_the_order_of_sets_does_not_matter() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_factbook as t; print(t.digest(t.small()))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=runtime.child_env({"PYTHONHASHSEED": seed}),
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {digest(small())}


def test_the_sizes_are_those_asked() -> None:
    book = small()
    tasks = Counter(c.task for c in book.conversations)
    assert tasks == {"question": 400, "extraction": 600, "reading": 120, "chat": 60}
    assert len(book.documents) == 300 + round(300 * 0.06)
    assert len(book.extraction_train) == 600
    assert Counter(e.kind for e in book.extraction_test) == {"mixed": 60, "specific": 60, "generic": 60}
    assert Counter(q.kind for q in book.questions_test) == {"specific": 40, "generic": 40}
    assert (len(book.chats), len(book.preferences)) == (40, 40)


def test_every_conversation_ends_with_an_answer() -> None:
    book = small()
    for talk in book.conversations:
        roles = [m.role for m in talk.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(m.content.strip() for m in talk.messages)
    assert all(chat[-1].role == "user" for chat in book.chats)
    assert all(p.chosen != p.rejected for p in book.preferences)


def test_every_gold_triple_stands_in_its_text_and_is_asked_for() -> None:
    for record in (r for seed in (0, 1) for r in all_extraction(small(seed))):
        assert record.relation
        assert len(set(record.allowed)) == len(record.allowed)
        for t in record.relation:
            assert t.head in record.text, record.id
            assert t.tail in record.text, record.id
            assert t.relation in record.allowed
            assert t.head != t.tail


def test_cleaning_keeps_the_gold_in_the_text() -> None:
    for record in all_extraction(small()):
        clean = tidy(record)
        assert isinstance(clean, Extraction)
        assert all(t.head in clean.text and t.tail in clean.text for t in clean.relation)


def test_the_answer_trained_is_the_gold() -> None:
    book = small()
    talks = [c for c in book.conversations if c.task == "extraction"]
    for record, talk in zip(book.extraction_train, talks, strict=True):
        assert record.text in talk.messages[0].content
        assert form.parse(talk.messages[1].content) == {(t.head, t.relation, t.tail) for t in record.relation}


def test_all_topics_are_trained_and_tested_and_in_the_schema() -> None:
    book = small()
    topics = set(world().topics)
    assert {e.cate for e in book.extraction_train} == {e.cate for e in book.extraction_test} == topics
    assert set(book.schema) == topics
    names = world()
    for record in all_extraction(book):
        chinese = {relation_name(names, record.cate, r, record.lang): r for r in book.schema[record.cate]}
        for t in record.relation:
            types = book.schema[record.cate][chinese[t.relation]]
            assert types == {"head_type": t.head_type, "tail_type": t.tail_type}


def test_the_english_share_is_about_as_asked() -> None:
    sizes = FactbookSizes(**(SMALL | {"english_share": 0.3, "extraction": 1500}))
    book = generate(0, None, sizes)
    share = sum(e.lang == "en" for e in book.extraction_train) / 1500
    assert abs(share - 0.3) < 0.04
    none = generate(0, None, FactbookSizes(**(SMALL | {"english_share": 0.0})))
    assert all(e.lang == "zh" for e in all_extraction(none))


# --- what the test holds out


def test_no_head_of_the_test_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    makers: list[Maker] = []
    compose = Maker.extraction_test

    def remember(self: Maker, *args: Any) -> list[Extraction]:
        makers.append(self)
        return compose(self, *args)

    monkeypatch.setattr(Maker, "extraction_test", remember)
    book = generate(3, None, FactbookSizes(**SMALL))
    trained = {t.head for e in book.extraction_train for t in e.relation}
    trained |= {e.name for e in split_entities(world(), 3, 0.15)[0]}
    assert trained <= makers[0].trained_names
    assert not {t.head for e in book.extraction_test for t in e.relation} & makers[0].trained_names


def test_real_entities_are_held_out_in_both_languages() -> None:
    known, held = split_entities(world(), 0, 0.15)
    everything = world().entities
    assert len(known) + len(held) == len(everything)
    assert not {e.name for e in known} & {e.name for e in held}
    names = {e.name for e in held if e.lang == "zh"}
    assert abs(len(names) / len({e.name for e in everything if e.lang == "zh"}) - 0.15) < 0.01
    for i, entity in enumerate(everything):
        if entity.lang == "en":
            assert (entity in held) == (everything[i - 1] in held)
    tested = {t.head for e in small().extraction_test for t in e.relation}
    assert tested & {e.name for e in held}


def test_held_out_records_say_whether_their_entities_are_real() -> None:
    real = {e.name for e in split_entities(world(), 0, 0.15)[1]}
    seen = set()
    for record in small().extraction_test:
        seen.add(record.source)
        named = {t.head in real for t in record.relation}
        allowed = {True} if record.source == REAL else {False} if record.source == INVENTED else {True, False}
        assert named <= allowed, record
    assert len(seen) == 3
    assert {e.source for e in small().extraction_train} == {SOURCE}


def filled(template: str, subject: str, relation: str, value: str) -> str:
    return template.replace("{e}", subject).replace("{r}", relation).replace("{v}", value)


def held_out_sentences(topic: str, relation: str, lang: Lang, name: str, value: str) -> list[str]:
    book = world()
    own, generic = getattr(book.topics[topic].relations[relation], lang), book.generic[lang]
    word = relation_name(book, topic, relation, lang)
    templates = [*own.statements_held_out, *own.questions_held_out]
    templates += [*generic["statements_held_out"], *generic["questions_held_out"]]
    return [filled(t, name, word, value) for t in templates]


def test_no_held_out_wording_of_a_true_fact_was_trained_on() -> None:
    book, known = small(), split_entities(world(), 0, 0.15)[0]
    texts = list(training_texts(book))
    checked = 0
    for entity in known:
        about = "\n".join(t for t in texts if entity.name in t)
        for relation, value in entity.facts.items():
            for sentence in held_out_sentences(entity.topic, relation, entity.lang, entity.name, value):
                assert sentence not in about
                checked += 1
    assert checked > 5000
    asked = {q.question for q in book.questions_test}
    assert not asked & set(texts)


def test_no_held_out_wording_of_an_invented_fact_was_trained_on() -> None:
    names = world()
    for record in small().extraction_train:
        lang: Lang = "en" if record.lang == "en" else "zh"
        own = {relation_name(names, record.cate, r, lang): r for r in names.topics[record.cate].relations}
        for t in record.relation:
            for sentence in held_out_sentences(record.cate, own[t.relation], lang, t.head, t.tail):
                assert sentence not in record.text


def test_held_out_questions_use_held_out_wordings_about_known_facts() -> None:
    known = split_entities(world(), 0, 0.15)[0]
    for question in small().questions_test:
        fits = [
            e.name
            for e in known
            for r, v in e.facts.items()
            if v == question.answer and question.question in held_out_sentences(e.topic, r, e.lang, e.name, v)
        ]
        assert fits, question.question


def test_no_held_out_question_is_asked_twice() -> None:
    sizes = FactbookSizes(**(SMALL | {"test_questions": 300}))
    asked = generate(0, None, sizes).questions_test
    assert len({q.question for q in asked}) == len({q.id for q in asked}) == len(asked) == 600


def test_few_entities_give_as_many_questions_as_there_are(tmp_path: Path) -> None:
    file = write_entities(tmp_path, ROWS[:2])
    book = generate(0, file, FactbookSizes(**(SMALL | {"test_questions": 300})))
    (entity,) = split_entities(tables.load(file), 0, 0.15)[0]
    expected = {
        filled(wording, entity.name, relation, "")
        for relation in entity.facts
        for wording in (
            *world().topics[entity.topic].relations[relation].zh.questions_held_out,
            *world().generic["zh"]["questions_held_out"],
        )
    }
    assert sorted(q.question for q in book.questions_test) == sorted(expected)


# --- a user's entities

ROWS: list[dict[str, Any]] = [
    {"topic": "人物", "name": "甲一", "facts": {"职业": "木匠", "国籍": "山国"}},
    {"topic": "人物", "name": "乙二", "facts": {"职业": "医生", "出生地点": "河村"}},
    {
        "topic": "建筑结构",
        "name": "丙塔",
        "facts": {"位于": "丁城"},
        "en": {"name": "Bing Tower", "facts": {}},
    },
    {"topic": "生物", "name": "戊鱼", "facts": {"别名": "己鱼"}},
]


def write_entities(folder: Path, rows: list[Any]) -> str:
    file = folder / "entities.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows))
    return str(file)


def test_an_entity_file_replaces_the_tables(tmp_path: Path) -> None:
    rows = [r | {"en": None} if "en" in r else r for r in ROWS]
    file = write_entities(tmp_path, ["\ufeff" + json.dumps(rows[0]), "", *rows[1:]])
    assert [e.name for e in tables.load(file).entities] == ["甲一", "乙二", "丙塔", "戊鱼"]
    book = generate(0, file, FactbookSizes(**SMALL))
    known, held = split_entities(tables.load(file), 0, 0.15)
    assert (len(known), len(held)) == (3, 1)
    answers = {v for e in known for v in e.facts.values()}
    assert {q.answer for q in book.questions_test} == answers
    texts = "\n".join(training_texts(book))
    assert all(e.name in texts for e in known)
    assert not any(e.name in texts for e in held)
    assert not any(e.name in texts for e in world().entities if len(e.name) > 3)
    assert {e.cate for e in book.extraction_test} == set(world().topics)  # invented ones fill the rest
    for record in all_extraction(book):
        assert all(t.head in record.text and t.tail in record.text for t in record.relation)


def test_english_comes_with_its_chinese_entity(tmp_path: Path) -> None:
    english = {"name": "Bing Tower", "facts": {"location": "Ding"}}
    relation = next(r for r in world().topics["建筑结构"].relations.values() if r.name == "位于")
    english["facts"] = {relation.name_en: "Ding"}
    file = write_entities(tmp_path, [*ROWS[:2], ROWS[2] | {"en": english}])
    found = [e for e in tables.load(file).entities if e.lang == "en"]
    assert [(e.name, e.facts) for e in found] == [("Bing Tower", {"位于": "Ding"})]


GOOD = json.dumps(ROWS[0], ensure_ascii=False)
PERSON = {"topic": "人物", "name": "丁三"}
UNKNOWN_FACT = {**PERSON, "facts": {"出生地": "x"}}
LINES = {**PERSON, "facts": {"职业": "a\nb"}}
HALF_A_PAIR = '{"topic": "人物", "name": "\\ud800", "facts": {"职业": "y"}}'
WRONG_ENGLISH = {**ROWS[0], "en": {"name": "Jia", "facts": {"职业": "x"}}}
BAD: dict[str, tuple[list[Any], str]] = {
    "unknown topic": ([{**ROWS[0], "topic": "人務"}], r":1: unknown topic '人務'; did you mean '人物'\?"),
    "no topic": ([{"name": "x", "facts": {"职业": "y"}}], ":1: unknown topic None"),
    "unknown relation": ([GOOD, UNKNOWN_FACT], ":2: unknown relation '出生地'; did you mean '出生地点'"),
    "not JSON": ([GOOD, "{"], ":2: not a JSON object"),
    "not an object": ([GOOD, "[1]"], ":2: expected a JSON object, found list"),
    "twice": ([GOOD, GOOD], ":2: '甲一' stands twice"),
    "empty": ([""], "holds no entities"),
    "one only": ([GOOD], "holds one entity; give two at least"),
    "no facts": ([GOOD, PERSON], ":2: key 'facts' must map relations to values"),
    "no name": ([{**ROWS[0], "name": " "}], ":1: key 'name' must be one line of text"),
    "a number": ([{**PERSON, "facts": {"职业": 7}}], ":1: the value of '职业' must be .*; found 7"),
    "a line break": ([LINES], ":1: the value of '职业' must be one line of text"),
    "half a pair": ([HALF_A_PAIR], ":1: key 'name' must be one line"),
    "English as text": ([{**ROWS[0], "en": "Jia"}], ":1: key 'en' must be an object"),
    "English without facts": ([{**ROWS[0], "en": {"name": "Jia"}}], ":1: key 'facts' must map relations"),
    "English relation": ([WRONG_ENGLISH], ":1: unknown relation '职业'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_entity_file_is_a_sentence(tmp_path: Path, what: str) -> None:
    rows, words = BAD[what]
    with pytest.raises(UserError, match=words) as error:
        tables.load(write_entities(tmp_path, rows))
    assert str(error.value).startswith(str(tmp_path / "entities.jsonl"))
    assert "\n" not in str(error.value)


def test_an_entity_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such entity file"):
        tables.load(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        tables.load(str(tmp_path))
    (tmp_path / "latin.jsonl").write_bytes('{"name": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="byte 10 is not UTF-8; save the entity file as UTF-8"):
        tables.load(str(tmp_path / "latin.jsonl"))
