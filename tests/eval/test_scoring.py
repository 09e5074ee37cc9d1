"""Scores = those worked out by hand, on the cases where scorers usually go wrong."""

from __future__ import annotations

import json

import pytest

from microlm.core.records import Extraction, Triple
from microlm.core.stats import micro_f1_ci
from microlm.eval import scoring
from microlm.eval.scoring import Counts
from microlm.text import extraction
from microlm.text.extraction import Bounds

RECORD = Extraction(
    id="x",
    cate="人物",
    text="李白，字太白，生于701年。杜甫是诗人。",
    relation=(
        Triple("李白", "别名", "太白"),
        Triple("李白", "出生日期", "701年"),
        Triple("杜甫", "职业", "诗人"),
        Triple("杜甫", "国籍", "唐朝"),  # stated, but not asked for
    ),
    allowed=("别名", "出生日期", "职业"),
)
GOLD = '{"李白":{"别名":"太白","出生日期":"701年"},"杜甫":{"职业":"诗人"}}'

YES, NO = True, False
# output → (matched, predicted, gold), (matched, predicted, gold) heads, parsed, schema-valid, unsupported
CASES: dict[str, tuple[str, tuple[int, int, int], tuple[int, int, int], bool, bool, int]] = {
    "gold": (GOLD, (3, 3, 3), (2, 2, 2), YES, YES, 0),
    "spaces outside strings do not count": (f"  {GOLD}\n", (3, 3, 3), (2, 2, 2), YES, YES, 0),
    "spaces inside strings count": ('{"李白":{"别名":" 太白"}}', (0, 1, 3), (1, 1, 2), YES, YES, 1),
    "one right, one wrong": ('{"李白":{"别名":"太白","出生日期":"杜甫"}}', (1, 2, 3), (1, 1, 2), YES, YES, 0),
    "invented value": ('{"李白":{"别名":"青莲"}}', (0, 1, 3), (1, 1, 2), YES, YES, 1),
    "head and tail swapped": ('{"太白":{"别名":"李白"}}', (0, 1, 3), (0, 1, 2), YES, YES, 0),
    "right value, other relation": ('{"李白":{"职业":"太白"}}', (0, 1, 3), (1, 1, 2), YES, YES, 0),
    "right value, other head": ('{"杜甫":{"别名":"太白"}}', (0, 1, 3), (1, 1, 2), YES, YES, 0),
    "relation that was not asked": ('{"杜甫":{"国籍":"唐朝"}}', (0, 1, 3), (1, 1, 2), YES, NO, 1),
    "a key twice, last counts": ('{"李白":{"别名":"x","别名":"太白"}}', (1, 1, 3), (1, 1, 2), YES, YES, 0),
    "a head twice, last counts": ('{"李白":{"别名":"太白"},"李白":{}}', (0, 0, 3), (0, 0, 2), YES, YES, 0),
    "list of values": ('{"李白":{"别名":["太白","701年"]}}', (1, 2, 3), (1, 1, 2), YES, YES, 0),
    "list with a duplicate": ('{"李白":{"别名":["太白","太白"]}}', (1, 1, 3), (1, 1, 2), YES, YES, 0),
    "list of one is no form of ours": ('{"李白":{"别名":["太白"]}}', (1, 1, 3), (1, 1, 2), YES, NO, 0),
    "empty object": ("{}", (0, 0, 3), (0, 0, 2), YES, YES, 0),
    "empty head object": ('{"李白":{}}', (0, 0, 3), (0, 0, 2), YES, YES, 0),
    "empty value is in every text": ('{"李白":{"别名":""}}', (0, 1, 3), (1, 1, 2), YES, NO, 0),
    "number as value": ('{"李白":{"出生日期":701}}', (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "null as value": ('{"李白":{"别名":null}}', (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "nested deeper": ('{"答案":{"李白":{"别名":"太白"}}}', (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "flat": ('{"别名":"太白"}', (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "list of triples": ('[["李白","别名","太白"]]', (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "string": ('"李白"', (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "fence": (f"```json\n{GOLD}\n```", (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "words before": (f"答：{GOLD}", (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "words after": (f"{GOLD}完", (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "cut off": (GOLD[:-1], (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "single quotes": (GOLD.replace('"', "'"), (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "trailing comma": ('{"李白":{"别名":"太白",}}', (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "nothing": ("", (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "deep nesting": ("[" * 100_000, (0, 0, 3), (0, 0, 2), NO, NO, 0),
    "escaped characters are the same characters": (
        '{"\\u674e\\u767d":{"别名":"太白"}}', (1, 1, 3), (1, 1, 2), YES, YES, 0,
    ),
    "too many heads": (json.dumps({str(i): {} for i in range(99)}), (0, 0, 3), (0, 0, 2), YES, NO, 0),
    "value too long": (json.dumps({"李白": {"别名": "长" * 999}}), (0, 1, 3), (1, 1, 2), YES, NO, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_extraction_equals_the_hand_computed_counts(name: str) -> None:
    output, triples, heads, parsed, valid, unsupported = CASES[name]
    outcome = scoring.score_extraction(RECORD, output, "stop", Bounds())
    assert outcome.triples == Counts(*triples)
    assert outcome.heads == Counts(*heads)
    assert (outcome.parsed, outcome.schema_valid, outcome.unsupported) == (parsed, valid, unsupported)
    assert not outcome.truncated


def test_gold_answer_is_exact_and_valid() -> None:
    assert extraction.answer(RECORD.relation, RECORD.allowed) == GOLD
    assert scoring.score_extraction(RECORD, GOLD, "stop", Bounds()).triples.is_exact


def test_empty_gold_counts_what_is_predicted_against_it() -> None:
    nothing = Extraction("x", "人物", RECORD.text, (), ("别名",))
    assert scoring.score_extraction(nothing, "{}", "stop", Bounds()).triples == Counts(0, 0, 0)
    assert scoring.score_extraction(nothing, "{}", "stop", Bounds()).triples.is_exact
    assert scoring.score_extraction(nothing, '{"李白":{"别名":"太白"}}', "stop", Bounds()).triples == Counts(
        0, 1, 0
    )


def test_duplicate_gold_counts_once() -> None:
    twice = Extraction("x", "人物", RECORD.text, RECORD.relation * 2, RECORD.allowed)
    assert scoring.score_extraction(twice, GOLD, "stop", Bounds()).triples == Counts(3, 3, 3)


def test_micro_f1_is_over_all_triples_not_over_items() -> None:
    # 3 of 3 and 0 of 1 predicted, 3 and 3 wanted: P = 3/4, R = 3/6, F1 = 2·3 / (4 + 6)
    assert micro_f1_ci([(3, 3, 3), (0, 1, 3)]).value == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        ("唐朝", "唐朝", True),
        (" 唐朝\n", "唐朝", True),
        ("唐朝。", "唐朝", False),
        ("唐", "唐朝", False),
        ("", "唐朝", False),
        ("Tang", "tang", False),
    ],
)
def test_exact_strips_and_nothing_else(output: str, answer: str, right: bool) -> None:
    assert scoring.exact(output, answer) is right


@pytest.mark.parametrize(("reason", "stopped"), [("stop", True), ("length", False), ("error", False)])
def test_only_stop_is_a_stop(reason: str, stopped: bool) -> None:
    assert scoring.stopped(reason) is stopped
    assert scoring.score_extraction(RECORD, GOLD, reason, Bounds()).truncated is (reason == "length")


def test_schema_check_refuses_a_rule_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="uniqueItems"):
        scoring.conforms([], {"uniqueItems": True})


def test_schema_check_reads_the_end_of_a_pattern_as_the_end() -> None:
    schema = extraction.json_schema(["a"], Bounds(chars=3))
    assert scoring.conforms({"x\ny": {"a": "b"}}, schema)
    assert not scoring.conforms({"xyz\n": {"a": "b"}}, schema)


def test_schema_check_by_keyword() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"enum": ["x"]}}}
    assert scoring.conforms({"a": "x", "b": 1}, schema)
    assert not scoring.conforms({"b": 1}, schema)
    assert not scoring.conforms({"a": "y"}, schema)
    assert not scoring.conforms([], schema)
    assert scoring.conforms(["a"], {"type": "array", "minItems": 1, "items": {"maxLength": 1}})
    assert not scoring.conforms(["ab"], {"type": "array", "items": {"maxLength": 1}})
