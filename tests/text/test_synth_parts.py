"""Of synthesis: templates stay in their sandbox, limits hold, answers are checked, a journal survives."""

from __future__ import annotations

import json
import random
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlm.core.client import ChatReply
from microlm.text.read import Fault
from microlm.text.synth.check import check_reply, check_schema
from microlm.text.synth.endpoint import Limiter, Stopped, retry_after_s
from microlm.text.synth.items import said_digest
from microlm.text.synth.journal import Answer, Journal
from microlm.text.synth.templates import Renderer, check_template

FIELDS = {"name": "李白", "born": 701, "works": ["静夜思", "将进酒"], "answer": "a <b> & 'c'"}


def render(text: str, syntax: Any = "jinja", dice: int = 0) -> str:
    return Renderer(syntax).render(text, FIELDS, random.Random(dice))


def fault_of(text: str, syntax: Any = "jinja") -> str:
    with pytest.raises(Fault) as caught:
        render(text, syntax)
    return caught.value.reason


@pytest.mark.parametrize(
    ("syntax", "text", "expected"),
    [
        ("jinja", " {{ name }}生于{{ born }}年 ", "李白生于701年"),
        ("jinja", "{% for w in works %}《{{ w }}》{% endfor %}", "《静夜思》《将进酒》"),
        ("jinja", "{{ works | tojson }} {{ answer }}", '["静夜思", "将进酒"] a <b> & \'c\''),
        ("jinja", "{{ record.name }} {{ record['born'] }}", "李白 701"),
        ("slots", "{name}生于{born}年：{works}", '李白生于701年：["静夜思", "将进酒"]'),
        (
            "slots",
            'As JSON: {"a": {}, "b": {{name}}} {{ name }}',
            'As JSON: {"a": {}, "b": {name}} {{ name }}',
        ),
    ],
)
def test_fields_are_filled_in(syntax: str, text: str, expected: str) -> None:
    assert render(text, syntax) == expected


def test_a_missing_field_is_named() -> None:
    assert fault_of("{{ nmae }}") == fault_of("{nmae}", "slots") == "missing_field:nmae"
    assert fault_of("{{ record.nmae }}") == "missing_field:nmae"


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ works.append(1) }}",
        "{{ name.__init__.__globals__ }}",
        "{{ range(10**9) | list }}",
        "{{ '{0.__class__}'.format(name) }}",
        "{{ 1 / 0 }}",
        "{% include 'x' %}",
    ],
)
def test_the_sandbox_holds(text: str) -> None:
    assert fault_of(text) in ("template_error", "missing_field:__class__", "missing_field:__init__")
    assert FIELDS["works"] == ["静夜思", "将进酒"]


def test_a_field_is_never_a_template() -> None:
    dangerous = {"name": "{{ 7 * 7 }}{name}"}
    for syntax, text in (("jinja", "{{ name }}"), ("slots", "{name}")):
        assert Renderer(syntax).render(text, dangerous, random.Random(0)) == "{{ 7 * 7 }}{name}"  # type: ignore[arg-type]


def test_random_choices_follow_from_the_dice_alone() -> None:
    text = "{{ ['a', 'b', 'c', 'd'] | random }}{{ works | random }}"
    random.seed(1)
    first = [render(text, dice=i) for i in range(30)]
    random.seed(2)
    assert [render(text, dice=i) for i in range(30)] == first
    assert len(set(first)) > 4


def test_templates_with_a_typing_mistake_are_refused() -> None:
    for text in ("{{ name", "{% if %}", "{{ name | nonsense }}"):
        with pytest.raises(ValueError, match="Jinja"):
            check_template(text, "jinja")


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 9}, "t": {"$ref": "#/$defs/word"}},
    "required": ["n"],
    "$defs": {"word": {"type": "string", "minLength": 1}},
}


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ('{"n": 3, "t": "x"}', "stop", ""),
        ('```json\n{"n": 3}\n```', "stop", ""),
        ('{"n": 3', "stop", "not_json"),
        ('{"n": NaN}', "stop", "not_json"),
        ("[" * 100_000, "stop", "not_json"),
        ('{"t": "x"}', "stop", "schema:required"),
        ('{"n": 10}', "stop", "schema:maximum"),
        ('{"n": 3, "t": ""}', "stop", "schema:minLength"),
        ('{"n": 3}', "length", "cut_off"),
        ('{"n": 3}', "content_filter", "filtered"),
        (" ", "stop", "empty_answer"),
        ("\ud83d", "stop", "lone_surrogate"),
    ],
)
def test_an_answer_that_does_not_fit_has_a_reason(text: str, finish: str, reason: str) -> None:
    found = ""
    try:
        check_reply(ChatReply(text, finish, None), SCHEMA)
    except Fault as fault:
        found = fault.reason
    assert found == reason


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"$ref": "#/$defs/none"},
        {"properties": {"a": {"$ref": "https://example.com/schema.json"}}},
    ],
)
def test_a_schema_that_cannot_be_checked_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"JSON schema|does not lead"):
        check_schema(schema)


def test_signs_inside_numbers_are_not_lost() -> None:
    different = [
        "1.5 + 2",
        "15 + 2",
        "1 5 + 2",
        "3 - 4",
        "34",
        "3/4",
        "3*4",
        "-3",
        "3",
        "1,5",
        "12:30",
        "1230",
    ]
    assert len({said_digest(t) for t in different}) == 12
    same = ["你好，李白！", "你好 李白", "你好李白。"]
    assert len({said_digest(t) for t in same}) == 1
    assert said_digest("１．５米") == said_digest("1.5米")


@given(st.lists(st.text(max_size=20), max_size=6), st.integers(0, 60), st.binary(max_size=5))
def test_a_journal_with_a_torn_end_keeps_all_before_it(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cut: int, rubbish: bytes
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    with Journal(path) as journal:
        ends = []
        for number, text in enumerate(texts):
            journal.add(2 * number, Answer(text.encode("utf-8", "replace").decode(), asked_model="m"))
            ends.append(path.stat().st_size)
    whole = path.read_bytes()
    kept = max(0, len(whole) - cut)
    path.write_bytes(whole[:kept] + rubbish.replace(b"\n", b""))
    with Journal(path) as journal:
        complete = sum(end <= kept for end in ends)
        assert journal.count == complete
        assert [journal.get(2 * i) is not None for i in range(len(texts))] == [
            i < complete for i in range(len(texts))
        ]
        journal.add(99, Answer("more"))
    with Journal(path) as journal:
        assert journal.get(99) == Answer("more")
        assert journal.count == complete + 1


def run_threads(limiter: Limiter, count: int, tokens: int) -> list[float]:
    """When each of `count` threads got its turn, in seconds from the start."""
    started, turns = time.monotonic(), []

    def work() -> None:
        limiter.acquire(tokens)
        turns.append(time.monotonic() - started)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(turns)


def test_requests_are_spaced_out() -> None:
    turns = run_threads(Limiter(requests_per_minute=1200), 11, 0)
    assert min(b - a for a, b in pairwise(turns)) > 0.045
    assert 0.49 < turns[-1] < 3


def test_tokens_are_spaced_out_and_settled() -> None:
    turns = run_threads(Limiter(tokens_per_minute=60_000), 6, 100)
    assert 0.49 < turns[-1] < 3
    limiter = Limiter(tokens_per_minute=60)
    limiter.acquire(1000)  # the next turn would be in a thousand seconds
    threading.Timer(0.2, limiter.settle, (1000, 0)).start()
    assert 0.1 < run_threads(limiter, 1, 1)[0] < 3


def test_a_pause_holds_for_all_and_a_stop_ends_it() -> None:
    limiter = Limiter()
    limiter.pause(0.3)
    assert run_threads(limiter, 3, 0)[0] > 0.29
    limiter.pause(600)
    threading.Timer(0.1, limiter.stop).start()
    with pytest.raises(Stopped):
        limiter.acquire(0)
    with pytest.raises(Stopped):
        limiter.sleep(600)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_s("2.5") == 2.5
    assert retry_after_s("99999") == 600
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.1
    assert [retry_after_s(word) for word in ("", "soon", "nan", "inf")] == [None] * 4


def test_a_journal_line_is_the_answer(tmp_path: Path) -> None:
    answer = Answer("x", "cut_off", "d", "served", "asked", 7, "length", {"total_tokens": 3}, ["not_json"])
    with Journal(tmp_path / "j") as journal:
        journal.add(0, answer)
        assert journal.get(0) == answer and 0 in journal and 1 not in journal
    assert json.loads((tmp_path / "j").read_text())["number"] == 0
