"""A model of random weights at temperature 1 under each kind of constraint: what ends by itself is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import jsonschema
import pytest

from microlm.core.records import Constraint, Sampling
from microlm.engine import Engine
from microlm.text import extraction

TEXT = '李白，字"太白"，号青莲居士\n唐代诗人。Li Bai was born in 701; path C:\\tmp 😀'
CHOICES = ["李白", "李白写诗", "the poet", '"', "😀"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "job": {"enum": ["诗人", "poet"]},
        "born": {"type": "integer"},
    },
    "required": ["name", "job"],
    "additionalProperties": False,
}
ASKED = ("朝代", "职业", "出生地")
RELATIONS = extraction.json_schema(ASKED, extraction.Bounds(heads=2, tails=3, chars=6), copied=True)


def fits(schema: dict[str, object]) -> Callable[[str], bool]:
    """Whether a text is compact JSON of a schema, by another's validator."""

    def check(text: str) -> bool:
        value = json.loads(text)
        jsonschema.validate(value, schema)
        outside = re.sub(r'"(?:\\.|[^"\\])*"', "", text)
        return not re.search(r"\s", outside)

    return check


def strings(value: object) -> list[str]:
    """All names and texts in a value."""
    if isinstance(value, dict):
        return [s for k, v in value.items() for s in (k, *strings(v))]
    if isinstance(value, list):
        return [s for v in value for s in strings(v)]
    return [value] if isinstance(value, str) else []


def copied(text: str) -> bool:
    """Whether all strings but the listed names stand in the text."""
    return all(s and s in TEXT for s in strings(json.loads(text)) if s not in ASKED)


def runs(units: list[str]) -> set[str]:
    """All runs of neighbouring units."""
    return {"".join(units[i:j]) for i in range(len(units)) for j in range(i + 1, len(units) + 1)}


SCHEMA = json.dumps(PERSON, ensure_ascii=False)
CASES: dict[str, tuple[Constraint, Callable[[str], bool]]] = {
    "json_schema": (Constraint("json_schema", SCHEMA), fits(PERSON)),
    "json_object": (Constraint("json_object"), fits({"type": "object"})),
    "regex": (
        Constraint("regex", r"(李白|杜甫|[a-z]{2,5}) [0-9]{1,3}[。.]"),
        lambda text: re.fullmatch(r"(李白|杜甫|[a-z]{2,5}) [0-9]{1,3}[。.]", text) is not None,
    ),
    "choice": (Constraint("choice", json.dumps(CHOICES)), CHOICES.__contains__),
    "grammar": (
        Constraint("grammar", 'start: "<" WORD ("," WORD){0,2} ">"\nWORD: /[a-z李白]{1,3}/'),
        lambda text: re.fullmatch(r"<[a-z李白]{1,3}(,[a-z李白]{1,3}){0,2}>", text) is not None,
    ),
    "copy": (Constraint("copy", copy_from=TEXT), lambda text: text != "" and text in TEXT),
    "copied words": (
        Constraint("copy", copy_from=TEXT, copy_words=True),
        lambda text: text == text.strip() and text in runs(re.findall(r"[A-Za-z0-9]+|[\s\S]", TEXT)),
    ),
    "copied relations": (
        Constraint("json_schema", json.dumps(RELATIONS, ensure_ascii=False), TEXT),
        lambda text: fits(RELATIONS)(text) and copied(text),
    ),
    "copied object": (
        Constraint("json_object", copy_from=TEXT),
        lambda text: fits({"type": "object"})(text) and copied(text),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_random_model_keeps_to_it(engine: Engine, kind: str) -> None:
    constraint, right = CASES[kind]
    each = [
        Sampling(max_tokens=100, temperature=1.0, seed=i, constraint=constraint, n=2) for i in range(0, 40, 2)
    ]
    answers = engine.generate(["a"] * len(each), each)
    assert len(answers) == 40
    assert {a.finish_reason for a in answers} <= {"stop", "length"}
    ended = [a for a in answers if a.finish_reason == "stop"]
    assert len(ended) >= 10 and len({a.text for a in ended}) > 1
    control = set(engine.tokenizer.control.values())
    for answer in ended:
        assert right(answer.text), answer.text
        ids = answer.token_ids
        body = ids[:-1] if ids[-1] == engine.tokenizer.eos_id else ids
        assert not control & set(body)
    for answer in answers:
        assert "\ufffd" not in answer.text or answer.finish_reason == "length"


@pytest.mark.parametrize("kind", ["json_schema", "copied relations", "regex"])
def test_company_drafts_and_streams_change_nothing(make_engine: Callable[..., Engine], kind: str) -> None:
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=3, constraint=CASES[kind][0])
    each = [replace(sampling, seed=i) for i in range(6)]
    alone = [make_engine(max_seqs=1).generate(["李白"], s)[0] for s in each]
    assert make_engine().generate(["李白"] * 6, each) == alone
    drafted = make_engine(speculate=4).generate(["李白"] * 6, each)
    assert [(a.text, a.token_ids, a.finish_reason) for a in drafted] == [
        (a.text, a.token_ids, a.finish_reason) for a in alone
    ]
    streamed = "".join(d.text for d in make_engine().stream("李白", each[0]))
    assert streamed == alone[0].text


def test_an_answer_cut_inside_is_told_and_one_that_is_whole_is_not(engine: Engine) -> None:
    cut = engine.generate(["a"], Sampling(max_tokens=3, constraint=CASES["json_schema"][0]))[0]
    assert cut.finish_reason == "length" and cut.error
    whole = engine.generate(["a"], Sampling(max_tokens=3, constraint=Constraint("regex", "[a-z]*")))[0]
    assert whole.error == ""
