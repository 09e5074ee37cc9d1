"""Synthesis against our own served model: equal bytes however it is run, stopped or refused."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import run_model
from synth_runs import DRAW, PEOPLE, SCHEMA, Watched, command, lines, payload, seeds, synth, watched
from tiny_model import write_tiny_model

from microlm.core import runtime
from microlm.core.client import Client
from microlm.core.errors import UserError
from microlm.core.records import Message, Sampling
from microlm.serve.gate import Limits

KINDS = {
    "name": "kinds",
    "task": "extraction",
    "prompt": "What is {{ name }}?",
    "json_schema": SCHEMA,
    "unique_answers": False,
}
FREE = {"name": "free", "prompt": "{{ name }}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Watched]:
    with watched(model) as server:
        yield server


@pytest.fixture
def server(running: Watched) -> Watched:
    running.answered, running.asked, running.faults = 0, [], []
    return running


@pytest.fixture
def people(tmp_path: Path) -> str:
    return seeds(tmp_path / "people.jsonl", [{"name": n, "licence": "CC0-1.0"} for n in PEOPLE])


def fields(server: Watched, people: str, **endpoint: Any) -> dict[str, Any]:
    return {"seeds": people, "draw": DRAW, "endpoint": {"url": server.url, **endpoint}}


def whole(server: Watched, people: str, **draw: Any) -> dict[str, Any]:
    """The same without a text that ends answers early: JSON ends by itself."""
    return fields(server, people) | {"draw": {**DRAW, "stop": [], **draw}}


def prompts(server: Watched) -> Counter[tuple[str, int]]:
    """What was asked how often, by prompt and seed."""
    return Counter((body["messages"][-1]["content"], body["seed"]) for body in server.asked)


def test_answers_are_those_of_the_model_and_are_accounted_for(
    server: Watched, people: str, tmp_path: Path
) -> None:
    made = synth(tmp_path / "out", **fields(server, people))
    counts = made.json("counts.json")
    assert counts["asked"] == 8 == counts["accepted"] + sum(counts["dropped"].values())
    assert counts["accepted"] >= 6
    chats, requests = lines(made.file("conversations/train.jsonl")), lines(made.file("requests.jsonl"))
    with Client(server.url) as client:
        for row in requests:
            drawn = {k: v for k, v in row["sampling"].items() if k != "stop"}
            sampling = Sampling(**drawn, stop=tuple(row["sampling"]["stop"]))
            reply = client.chat([Message(**m) for m in row["messages"]], sampling, row["model"])
            assert row["answer"] == reply.text.strip() and row["served_model"] == reply.model == "tiny"
            assert row["finish_reason"] == "stop" and reply.usage
            assert row["usage"]["completion_tokens"] == reply.usage.completion_tokens
            if not row["reason"]:
                assert chats[row["record"]]["messages"][-1]["content"] == row["answer"]
    assert len({row["sampling"]["seed"] for row in requests}) == 8


def test_bytes_do_not_depend_on_how_many_are_asked_at_once(
    server: Watched, people: str, tmp_path: Path
) -> None:
    both = [KINDS, FREE]
    given = [
        synth(tmp_path / str(n), **fields(server, people, concurrency=n), templates=both) for n in (1, 4, 16)
    ]
    assert payload(given[0]) == payload(given[1]) == payload(given[2])
    assert len({g.digest for g in given}) == 1


def test_schema_answers_fit_and_become_the_conversation_of_the_recipe(
    server: Watched, people: str, tmp_path: Path
) -> None:
    answer = "{{ 'Yes' if reply.alive else 'No' }}, a {{ reply.kind }}."
    result = {"prompt": "Is {{ name }} alive?", "answer": answer}
    made = synth(tmp_path / "out", **whole(server, people), templates=[KINDS | {"result": result}])
    sent = server.asked[0]["response_format"]
    assert sent["type"] == "json_schema" and sent["json_schema"]["schema"] == SCHEMA
    chats = lines(made.file("conversations/train.jsonl"))
    assert len(chats) == 8
    answers = {f"{a}, a {k}." for a in ("Yes", "No") for k in ("poet", "physicist")}
    assert {c["messages"][-1]["content"] for c in chats} <= answers
    assert chats[0]["messages"][0]["content"] == "Is 李白 alive?"


def test_an_unfit_answer_is_drawn_again_with_another_seed_and_then_dropped(
    server: Watched, people: str, tmp_path: Path
) -> None:
    loose = KINDS | {"constrain": False}
    with pytest.raises(UserError, match=r"nothing is left of 8.*not_json"):
        synth(tmp_path / "out", **fields(server, people), templates=[loose])
    assert len(server.asked) == 24 and "response_format" not in server.asked[0]
    assert len(prompts(server)) == 24
    made = synth(tmp_path / "two", **fields(server, people), templates=[loose, FREE])
    rows = [r for r in lines(made.file("requests.jsonl")) if r["template"] == "kinds"]
    assert [len(r["repeated_for"]) for r in rows] == [2] * 8 and all(r["reason"] for r in rows)
    repeated = made.json("counts.json")["repeated_attempts"]
    assert repeated["not_json"] >= sum(r["repeated_for"].count("not_json") for r in rows) > 0
    cut = synth(tmp_path / "cut", **whole(server, people, max_tokens=30), templates=[KINDS, FREE])
    assert set(cut.json("counts.json")["dropped"]) == {"cut_off"}


def test_equal_answers_are_kept_once_unless_the_template_says_otherwise(
    server: Watched, people: str, tmp_path: Path
) -> None:
    unique = synth(tmp_path / "a", **whole(server, people), templates=[KINDS | {"unique_answers": True}])
    counts = unique.json("counts.json")
    assert counts["accepted"] <= 4 and counts["dropped"] == {"duplicate_answer": 8 - counts["accepted"]}
    every = synth(tmp_path / "b", **whole(server, people), templates=[KINDS])
    assert every.json("counts.json")["accepted"] == 8
    drawn = whole(server, people, samples=6)
    several = synth(tmp_path / "c", **drawn, templates=[KINDS], limit=12).json("counts.json")
    assert several["asked"] == 12 and several["dropped"]["duplicate_conversation"] >= 4


def test_a_busy_endpoint_is_waited_for(server: Watched, people: str, tmp_path: Path) -> None:
    calm = synth(tmp_path / "calm", **fields(server, people))
    server.faults = [(429, {"Retry-After": "1"}), (500, {}), (503, {"Retry-After": "0"}), (502, {})]
    started = time.monotonic()
    made = synth(tmp_path / "busy", **fields(server, people, concurrency=2))
    assert time.monotonic() - started > 1
    assert payload(made) == payload(calm)


def test_a_full_queue_of_our_server_is_waited_for(model: Path, people: str, tmp_path: Path) -> None:
    with run_model(model, limits=Limits(max_queue=1), max_seqs=1) as narrow:
        asked = {"url": narrow.url, "concurrency": 4, "retries": 30}
        made = synth(tmp_path / "out", seeds=people, draw=DRAW, endpoint=asked)
        assert made.json("counts.json")["asked"] == 8


def test_requests_per_minute_hold(server: Watched, people: str, tmp_path: Path) -> None:
    started = time.monotonic()
    synth(tmp_path / "out", **fields(server, people, requests_per_minute=600))
    assert time.monotonic() - started > 0.7


def test_tokens_per_minute_count_what_was_used(server: Watched, people: str, tmp_path: Path) -> None:
    asked = fields(server, people, tokens_per_minute=12_000) | {"draw": {**DRAW, "max_tokens": 400}}
    started = time.monotonic()
    made = synth(tmp_path / "out", **asked, limit=5)
    seconds = time.monotonic() - started
    used = [row["usage"]["total_tokens"] for row in lines(made.file("requests.jsonl"))]
    assert sum(used[:-1]) * 60 / 12_000 - 1 < seconds < 7  # by the estimates alone it takes eight seconds


def test_one_refused_item_is_dropped_and_many_stop_the_run(
    server: Watched, people: str, tmp_path: Path
) -> None:
    calm = synth(tmp_path / "calm", **fields(server, people))
    long = {"name": "x" * 3000}
    mixed = seeds(tmp_path / "mixed.jsonl", [{"name": "Hypatia"}, long, {"name": "Euclid"}])
    made = synth(tmp_path / "out", **fields(server, mixed))
    assert made.json("counts.json")["dropped"] == {"refused_400": 1}
    assert str(server.url) not in made.file("requests.jsonl").read_text()
    server.faults = [(400, {})] * 3
    with pytest.raises(UserError, match=r"3 requests in a row were refused; the last: .*not now"):
        synth(tmp_path / "again", **fields(server, people, max_refusals=3, concurrency=1))
    assert payload(synth(tmp_path / "again", **fields(server, people))) == payload(calm)


def test_a_wrong_key_or_model_stops_at_once(
    model: Path, server: Watched, people: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"404.*run the same command again"):
        synth(tmp_path / "out", **fields(server, people, model="none", concurrency=1))
    assert len(server.asked) <= 3
    key = tmp_path / "key"
    key.write_text("wrong-key-of-the-tests")
    with watched(model, api_key="right-key-of-the-tests") as closed, pytest.raises(UserError, match="401"):
        synth(tmp_path / "out", **fields(closed, people, api_key_file=str(key)))


def test_an_endpoint_that_goes_away_stops_the_run_and_another_finishes_it(
    model: Path, server: Watched, people: str, tmp_path: Path
) -> None:
    calm = synth(tmp_path / "calm", **fields(server, people))
    server.asked = []
    with watched(model) as first:
        first.gone_after = 3
        with pytest.raises(UserError, match=r"503.*after 1 repetitions; the answers so far are kept"):
            synth(tmp_path / "out", **fields(first, people, concurrency=1, retries=1))
    kept = len(lines(tmp_path / "out.tmp/resume/journal.jsonl"))
    with pytest.raises(UserError, match=r"cannot connect"):
        synth(tmp_path / "out", **fields(first, people))
    made = synth(tmp_path / "out", **fields(server, people))  # at another address
    assert payload(made) == payload(calm)
    assert 0 < kept <= 3 and len({name for name, _ in prompts(server)}) == 8 - kept


MANY = [f"No. {i}" for i in range(24)]


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def start(out: Path, asked: dict[str, Any]) -> subprocess.Popen[bytes]:
    env = runtime.child_env({"OMP_NUM_THREADS": "1"})
    return subprocess.Popen(command(out=str(out), **asked), env=env, stderr=subprocess.PIPE)


def test_killed_and_continued_equals_undisturbed(server: Watched, tmp_path: Path) -> None:
    names = seeds(tmp_path / "many.jsonl", [{"name": n} for n in MANY])
    calm = synth(tmp_path / "calm", **fields(server, names))
    server.asked = []
    out = tmp_path / "out"
    for count in (4, 9, 14):
        process = start(out, fields(server, names, requests_per_minute=1200, concurrency=3))
        wait_for_lines(tmp_path / "out.tmp/resume/journal.jsonl", count, process)
        process.kill()
        process.communicate()
    assert not out.exists()
    made = synth(out, **fields(server, names))
    assert payload(made) == payload(calm) and made.digest == calm.digest
    again = sum(count - 1 for count in prompts(server).values())
    assert again <= 3 * 3 * 2  # only what was under way is asked again, with the attempts before


def test_ctrl_c_loses_no_answer(server: Watched, tmp_path: Path) -> None:
    names = seeds(tmp_path / "many.jsonl", [{"name": n} for n in MANY])
    once = fields(server, names, requests_per_minute=360, concurrency=3) | {"draw": {**DRAW, "attempts": 1}}
    calm = synth(tmp_path / "calm", **once)
    server.answered, server.asked = 0, []
    process = start(tmp_path / "out", once)
    journal = tmp_path / "out.tmp/resume/journal.jsonl"
    wait_for_lines(journal, 6, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0 and told.splitlines()[-1] == b"KeyboardInterrupt"
    assert len(lines(journal)) == server.answered == len(server.asked) < 24
    made = synth(tmp_path / "out", **once)
    assert payload(made) == payload(calm)
    assert len(server.asked) == len({b["seed"] for b in server.asked}) == 24


def test_answers_of_two_models_are_not_mixed(server: Watched, people: str, tmp_path: Path) -> None:
    server.faults = [(400, {})]
    asked = fields(server, people, concurrency=1, max_refusals=1)
    with pytest.raises(UserError, match="in a row"):
        synth(tmp_path / "out", **asked)
    journal = tmp_path / "out.tmp/resume/journal.jsonl"
    journal.write_text('{"number": 0, "text": "x", "asked_model": "another"}\n')
    with pytest.raises(UserError, match="serves 'tiny', the earlier answers of this run are of 'another'"):
        synth(tmp_path / "out", **asked)
