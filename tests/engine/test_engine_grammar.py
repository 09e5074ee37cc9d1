"""Constrained output always parses and fits its schema, even from a random model at temperature 1."""

from __future__ import annotations

import json
from typing import Any

import pytest

from microlm.core.errors import UserError
from microlm.core.records import Constraint, Sampling
from microlm.engine import Engine
from microlm.engine.grammar.limits import MAX_DEPTH, nesting

TAIL = {"type": "string", "minLength": 1, "maxLength": 4}
INNER = {"type": "object", "properties": {"出生地": TAIL, "job": TAIL}, "additionalProperties": False}
EXTRACTION = {
    "type": "object",
    "patternProperties": {"^.{1,4}$": INNER},
    "additionalProperties": False,
    "maxProperties": 2,
}


def schema_of(schema: str) -> Constraint:
    """An answer of a JSON schema."""
    return Constraint("json_schema", schema)


def fits_extraction(value: Any) -> bool:
    """EXTRACTION by hand, for there is no validator among the dependencies."""
    return (
        isinstance(value, dict)
        and len(value) <= 2
        and all(1 <= len(head) <= 4 and isinstance(inner, dict) for head, inner in value.items())
        and all(set(inner) <= {"出生地", "job"} for inner in value.values())
        and all(isinstance(t, str) and 1 <= len(t) <= 4 for inner in value.values() for t in inner.values())
    )


def test_a_random_model_always_fits_the_schema(engine: Engine) -> None:
    schema = json.dumps(EXTRACTION, ensure_ascii=False)
    each = [
        Sampling(max_tokens=120, temperature=1.0, seed=i, constraint=schema_of(schema)) for i in range(100)
    ]
    answers = engine.generate(["a"] * 100, each)
    assert {a.finish_reason for a in answers} <= {"stop", "length"}
    ended = [a for a in answers if a.finish_reason == "stop"]
    assert len(ended) >= 90 and len({a.text for a in ended}) > 50
    for answer in ended:
        value = json.loads(answer.text)
        assert fits_extraction(value)
        assert answer.text.encode()  # no lone surrogates


def test_whitespace_stays_out(engine: Engine) -> None:
    schema = '{"type":"array","items":{"type":"integer"},"maxItems":3}'
    each = [Sampling(max_tokens=60, temperature=1.0, seed=i, constraint=schema_of(schema)) for i in range(30)]
    for answer in engine.generate(["a"] * 30, each):
        assert not set(answer.text) & set(" \n\t\r")


def test_choices_and_constants(engine: Engine) -> None:
    greedy = engine.generate(
        ["a"] * 2, [Sampling(constraint=schema_of(s)) for s in ('{"enum":["李白","x"]}', '{"const":[1,2]}')]
    )
    assert json.loads(greedy[0].text) in ("李白", "x")
    assert greedy[1].text == "[1,2]"
    assert [a.finish_reason for a in greedy] == ["stop", "stop"]


def test_being_cut_inside_json_is_told(engine: Engine) -> None:
    answer = engine.generate(
        ["a"], Sampling(max_tokens=2, constraint=schema_of('{"const":"a long constant text"}'))
    )[0]
    assert answer.finish_reason == "length"
    with pytest.raises(ValueError):
        json.loads(answer.text)


def test_constrained_and_free_requests_share_a_batch(engine: Engine) -> None:
    free, bound = Sampling(max_tokens=30), Sampling(max_tokens=30, constraint=schema_of('{"const":[1,2]}'))
    alone = engine.generate(["hello"], free)[0]
    together = engine.generate(["hello"] * 3, [free, bound, free])
    assert [together[0], together[2]] == [alone, alone]
    assert together[1].text == "[1,2]"


def test_stream_of_json_equals_the_whole(engine: Engine) -> None:
    sampling = Sampling(max_tokens=80, temperature=1.0, seed=1, constraint=schema_of(json.dumps(EXTRACTION)))
    assert "".join(d.text for d in engine.stream("a", sampling)) == engine.generate(["a"], sampling)[0].text


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("true", "JSON object"),
        ('{"type":"strin"}', "strin"),
        ('{"propertyNames":{"maxLength":3}}', "propertyNames"),
        ('{"type":"string","pattern":"(a"}', "pattern|regex"),
        ('{"enum":[]}', "empty"),
        ('{"$ref":"#"}', "json_schema"),
        ('{"$ref":"http://example.com/x"}', "json_schema"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested 40 deep"),
        ('{"description":"' + "x" * 70_000 + '"}', "characters"),
        ("[" * 100_000, "characters"),
    ],
)
def test_a_schema_that_cannot_be_used_is_a_sentence(engine: Engine, schema: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        engine.add("a", Sampling(constraint=schema_of(schema)))
    assert "\n" not in str(caught.value)
    assert not engine.busy


def test_nesting_counts_brackets_outside_of_strings() -> None:
    assert nesting('{"a":[1,{"b":"[[[{{{\\"["}]}') == 3
    deep = "[" * MAX_DEPTH
    assert nesting(deep) == MAX_DEPTH
