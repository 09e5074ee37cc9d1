"""Rewards on answers that were judged by hand; the recipe knows every name, and the other way round."""

from __future__ import annotations

import json
import typing
from decimal import Decimal
from pathlib import Path

import pytest
from answering import recipe

from microlm.cli.training.rewards import REWARDS, find
from microlm.core.errors import UserError
from microlm.core.records import Completion, Conversation, FinishReason
from microlm.text.sources.arithmetic import answer_of
from microlm.train.batches.prompts import Prompt
from microlm.train.tuning.grpo import RewardName


def judged(name: str, gold: str, text: str, reason: FinishReason = "stop", **fields: str) -> float:
    prompt = Prompt(Conversation(()), (1, 2), gold)
    reward, _ = find(name, recipe(**fields))
    return reward(prompt, Completion(text, (5, 6), reason, 2))


GOLD = '{"李白":{"朝代":"唐代","职业":["诗人","剑客"]}}'


@pytest.mark.parametrize(
    ("text", "f1"),
    [
        (GOLD, 1.0),
        ('{"李白": {"职业": ["剑客", "诗人"], "朝代": "唐代"}}', 1.0),
        ('{"李白":{"朝代":"唐代"}}', 0.5),
        ('{"李白":{"朝代":"唐","职业":"诗人"}}', 2 / 5),
        ('{"杜甫":{"朝代":"唐代"}}', 0.0),
        ("{}", 0.0),
        (GOLD[:-1], 0.0),
        ('["李白"]', 0.0),
    ],
)
def test_extraction_is_strict_f1(text: str, f1: float) -> None:
    assert judged("extraction", GOLD, text) == pytest.approx(f1)
    assert judged("extraction", "{}", "{}") == 1.0


def test_json_is_one_object_and_of_the_schema(tmp_path: Path) -> None:
    assert [judged("json", "", t) for t in ("{}", ' {"a": 1}', "[]", "{", "{} and more", "1")] == [
        1,
        1,
        0,
        0,
        0,
        0,
    ]
    schema = tmp_path / "schema.json"
    schema.write_text(
        json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "string"}}})
    )
    asked = {"json_schema": str(schema)}
    assert [judged("json", "", t, **asked) for t in ('{"a":"b"}', '{"a":1}', "{}", "x")] == [1, 0, 0, 0]
    schema.write_text('{"properties": {"n": {"type": ["integer", "null"], "minimum": 3}}}')
    answers = ('{"n": 3}', '{"n": null}', '{"n": 2}', '{"n": 3.5}', '{"n": NaN}', "[" * 10**5)
    assert [judged("json", "", t, **asked) for t in answers] == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not JSON"),
        ("[]", "holds no JSON object"),
        ('{"type": "number of sorts"}', "not a JSON schema"),
        ('{"properties": {"a": {"$ref": "#/$defs/none"}}}', "does not lead to a place"),
    ],
)
def test_a_schema_that_cannot_be_checked_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        judged("json", "", "{}", json_schema=str(tmp_path / "schema.json"))


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("42", "First 6 × 7, so it is 42.", 1),
        ("#### 1,234", "1234", 1),
        ("3.50", "the rest is 3.5 yuan", 1),
        ("-2", "−2", 1),
        ("42", "42 … no, 43", 0),
        ("42", "nothing", 0),
        ("nothing", "nothing", 0),
        ("10", "5-10", 0),
        ("答：8 个。", "<think>\n3 + 4 = 7\n</think>\n\n答：8 个。", 1),
        ("7", "<think>\n3 + 4 = 7", 0),
        ("7", "<think>\n3 + 4 = 7\n</think>\n\n", 0),
    ],
)
def test_arithmetic_compares_the_last_number(gold: str, text: str, right: float) -> None:
    assert judged("arithmetic", gold, text) == right


def test_a_number_ends_before_a_full_stop() -> None:
    assert answer_of("It is 1,000.") == Decimal(1000) and answer_of("12, 13") == Decimal(13)


def test_form() -> None:
    assert [judged("ended", "", "x", r) for r in ("stop", "length")] == [1.0, 0.0]
    assert [judged("length", "four", t) for t in ("", "two", "four", "12345678")] == [1, 1, 1, 0.5]


@pytest.mark.parametrize(
    ("name", "gold", "can"),
    [
        ("extraction", GOLD, True),
        ("extraction", "{}", True),
        ("extraction", "Li Bai", False),
        ("arithmetic", "It is 4.", True),
        ("arithmetic", "four", False),
        ("length", "four", True),
        ("length", "", False),
        ("json", "", True),
        ("ended", "", True),
    ],
)
def test_a_reward_says_what_it_can_judge_by(name: str, gold: str, can: bool) -> None:
    assert find(name, recipe())[1](gold) is can


def test_names() -> None:
    assert {*REWARDS, "json"} == {*typing.get_args(RewardName)}
    with pytest.raises(UserError, match="grpo: rewards"):
        recipe(rewards={"extractoin": 1})
    with pytest.raises(UserError, match="none has a weight above 0"):
        recipe(rewards={"json": 0})
