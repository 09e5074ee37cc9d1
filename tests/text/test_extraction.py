"""parse(answer) = the triples asked for; the schema admits gold answers and nothing of another shape."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from artifacts import write_data, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from microlm.core.records import Extraction, Triple
from microlm.text.extraction import LARGEST, Bounds, answer, json_schema, parse, prompt
from microlm.text.sources import factbook
from microlm.text.sources.factbook import FactbookSizes

BOUNDS = Bounds()
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=BOUNDS.chars)
ALLOWED = ["朝代", "出生地", "born in"]
TRIPLES = st.lists(st.builds(Triple, NAME, st.sampled_from([*ALLOWED, "not asked"]), NAME), max_size=8)


@given(triples=TRIPLES)
def test_parse_of_answer_is_what_was_asked(triples: list[Triple]) -> None:
    asked = frozenset((t.head, t.relation, t.tail) for t in triples if t.relation in ALLOWED)
    assert parse(answer(triples, ALLOWED)) == asked


def test_answer_is_compact_and_in_the_order_asked() -> None:
    triples = [
        Triple("杜甫", "出生地", "巩县"),
        Triple("李白", "出生地", "碎叶"),
        Triple("李白", "朝代", "唐"),
        Triple("杜甫", "出生地", "巩县"),
        Triple("李白", "出生地", '"四川"'),
    ]
    expected = '{"杜甫":{"出生地":"巩县"},"李白":{"朝代":"唐","出生地":["碎叶","\\"四川\\""]}}'
    assert answer(triples, ["朝代", "出生地"]) == expected
    assert answer([], ALLOWED) == "{}"


@pytest.mark.parametrize(
    "output",
    [
        "", "李白", "[]", '"x"', "null", '{"a":1}', '{"a":"b"}', '{"a":["b"]}', '{"a":{"b":1}}',
        '{"a":{"b":null}}',
        '{"a":{"b":["c",1]}}', '{"a":{"b":{"c":"d"}}}', '{"a":{"b":"c"}', '{"a":{"b":"c"}} x', "[" * 100_000,
        '```json\n{"a":{"b":"c"}}\n```',
    ],
)  # fmt: skip
def test_other_shapes_are_not_parsed(output: str) -> None:
    assert parse(output) is None


def test_prompt_names_relations_and_text() -> None:
    assert prompt("李白是诗人", ["朝代", "职业"]) == "抽取为JSON：朝代、职业\n文本：李白是诗人"
    assert prompt("Li Bai", ["dynasty", "job"], "en") == "Extract as JSON: dynasty, job\nText: Li Bai"


@pytest.fixture(scope="module")
def accepts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Whether llguidance, on a byte-level vocabulary, accepts a whole text under a schema."""
    llguidance = pytest.importorskip("llguidance")
    from llguidance.hf import from_tokenizer
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("run")
    path = write_tokenizer(root / "t", write_data(root / "data"), vocab_size=272).path
    theirs = AutoTokenizer.from_pretrained(path)
    inner = from_tokenizer(theirs)

    def check(schema: dict[str, Any], text: str) -> bool:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
        )
        matcher = llguidance.LLMatcher(inner, grammar)
        ids = theirs.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


@pytest.mark.parametrize(
    "triples",
    [
        [],
        [Triple("李白", "朝代", "唐")],
        [Triple('Li "Bai"', "born in", "长" * BOUNDS.chars)],
        [Triple("Li\nBai", "born in", "a\nb")],
        [Triple("\n" * BOUNDS.chars, "born in", "x")],
        [Triple("李白", "出生地", f"地{i}") for i in range(BOUNDS.tails)],
        [Triple(f"人{i}", relation, "x") for i in range(BOUNDS.heads) for relation in ALLOWED],
    ],
)  # fmt: skip
def test_schema_admits_gold_answers(accepts: Any, triples: list[Triple]) -> None:
    assert accepts(json_schema(ALLOWED, BOUNDS), answer(triples, ALLOWED))


@pytest.mark.parametrize(
    "text",
    [
        "[]", '{"李白":"唐"}', '{"李白":{"职业":"诗人"}}', '{"李白":{"朝代":1}}', '{"李白":{"朝代":""}}',
        '{"":{"朝代":"唐"}}', '{"李白": {"朝代":"唐"}}', '{"a":{"b":"c"}}x',
        '{"李白":{"朝代":"' + "长" * (BOUNDS.chars + 1) + '"}}',
        '{"' + "长" * (BOUNDS.chars + 1) + '":{"朝代":"唐"}}',
        '{"' + "长" * BOUNDS.chars + '\\n":{"朝代":"唐"}}',
        "{" + ",".join(f'"{i}":{{"朝代":"x"}}' for i in range(BOUNDS.heads + 1)) + "}",
    ],
)  # fmt: skip
def test_schema_refuses_other_shapes(accepts: Any, text: str) -> None:
    assert not accepts(json_schema(ALLOWED, BOUNDS), text)


@pytest.mark.parametrize(
    "text",
    [
        "{}", "[]", '{"李白":{"朝代":"唐"}}', '{"李白":{}}', '{"李白":{"职业":"诗人"}}', '{"":{"朝代":"唐"}}',
        '{"李白":{"朝代":["唐","宋"]}}', '{"李白":{"朝代":["唐"]}}', '{"李白":{"朝代":""}}',
        '{"' + "长" * BOUNDS.chars + '":{}}', '{"' + "长" * (BOUNDS.chars + 1) + '":{}}',
        "{" + ",".join(f'"{i}":{{}}' for i in range(BOUNDS.heads)) + "}",
        "{" + ",".join(f'"{i}":{{}}' for i in range(BOUNDS.heads + 1)) + "}",
    ],
)  # fmt: skip
def test_both_forms_of_the_schema_admit_the_same(text: str) -> None:
    plain, copied = (
        jsonschema.Draft202012Validator(json_schema(ALLOWED, BOUNDS, copied)) for copied in (False, True)
    )
    assert plain.is_valid(json.loads(text)) == copied.is_valid(json.loads(text))


def test_every_gold_answer_of_the_factbook_fits_the_schema(accepts: Any) -> None:
    sizes = {"documents": 1, "questions": 0, "extraction": 1500, "reading": 0, "chat": 0, "preferences": 0}
    made = FactbookSizes(**sizes, english_share=0.6, test_extraction=400)
    corpus = factbook.generate(0, None, made)
    records, bounds = corpus.extraction_test, BOUNDS.widened(corpus.extraction_train)
    assert bounds.chars > BOUNDS.chars  # one of these names is longer than the usual bound
    for record in records:
        gold = answer(record.relation, record.allowed)
        assert accepts(json_schema(record.allowed, bounds), gold), gold


def test_bounds_widen_as_far_as_the_gold_needs_and_no_further() -> None:
    def record(*triples: Triple) -> Extraction:
        return Extraction("x", "", "", triples, tuple(ALLOWED))

    assert BOUNDS.widened([record(Triple("李白", "朝代", "唐"))]) == BOUNDS
    assert BOUNDS.widened([record(Triple("李白", "not asked", "长" * 99))]) == BOUNDS
    assert BOUNDS.widened([record(Triple("李白", "朝代", "长" * 99))]) == Bounds(3, 4, 99)
    assert BOUNDS.widened([record(Triple("长" * 99, "朝代", "唐"))]) == Bounds(3, 4, 99)
    assert BOUNDS.widened([record(*(Triple("李白", "朝代", f"{i % 7}") for i in range(14)))]) == Bounds(
        3, 7, 30
    )
    assert BOUNDS.widened([record(*(Triple(f"{i}", "朝代", "唐") for i in range(5)))]) == Bounds(5, 4, 30)


def test_one_outlier_does_not_undo_the_bounds() -> None:
    page = Extraction("x", "", "", (Triple("李白", "朝代", "长" * 9000),), tuple(ALLOWED))
    many = tuple(Triple(f"人{i % 99}", "朝代", f"朝{i}") for i in range(9900))
    assert BOUNDS.widened([page]) == Bounds(3, 4, 256)
    assert BOUNDS.widened([page, Extraction("y", "", "", many, tuple(ALLOWED))]) == LARGEST
