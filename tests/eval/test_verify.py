"""Verify must be seen to fail: every server broken on purpose fails exactly its own line."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from broken_server import MALFORMED, broken
from serving import run_model
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from microlm.core.client import Client
from microlm.core.errors import CheckFailed, UserError
from microlm.eval.verify import verdict
from microlm.eval.verify.smoke import SMOKE

FAULTS = {
    "unhealthy": ("health", "500"),
    "no models": ("models", "empty"),
    "usage does not add up": ("chat", "total_tokens"),
    "history ignored": ("multi-turn", "ignored"),
    "history counted only": ("multi-turn", "not read"),
    "assistant's turns dropped": ("multi-turn", "cut or ignored"),
    "characters cut": ("unicode", "U+FFFD"),
    "accents lost": ("unicode", "came back as"),
    "split characters": ("unicode", "U+FFFD"),
    "no DONE": ("streaming", "[DONE]"),
    "ids change": ("streaming", "'id'"),
    "no role": ("streaming", "role"),
    "no reason": ("streaming", "finish_reason"),
    "no usage chunk": ("streaming", "usage"),
    "chunk twice": ("streaming", "joined"),
    "stop ignored": ("stop", "is ignored"),
    "stop kept": ("stop", "is in the text"),
    "max_tokens ignored": ("max_tokens", "ignored"),
    "usage wrong": ("max_tokens", "usage.completion_tokens is 8, expected 5"),
    "seed ignored": ("seed", "equal seeds gave"),
    "one seed for all": ("seed", "changes no text"),
    "schema ignored": ("json_schema", "not JSON"),
    "error not JSON": ("errors", "without OpenAI's error object"),
    "error 500": ("errors", "expected 4xx"),
    "any model": ("errors", "unknown model"),
}


def judge(url: str) -> verdict.Verdict:
    with Client(url, timeout_s=60) as client:
        return verdict.judge(client, SMOKE, "toy" if "1" in url else None)


def test_a_right_server_passes_every_line():
    with broken() as url:
        result = judge(url)
    assert [(c.name, c.status, c.detail) for c in result.checks if c.status != "pass"] == []
    assert len(result.checks) == 12 and "came out whole" in result.checks[4].detail
    verdict.require_passed(result)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_exactly_its_line(fault):
    with broken(fault) as url:
        result = judge(url)
    line, word = FAULTS[fault]
    others = {"unicode"} if fault == "chunk twice" else set()  # it compares streams too
    assert {c.name for c in result.checks if c.status == "fail"} == {line} | others
    assert word in next(c.detail for c in result.checks if c.name == line)
    with pytest.raises(CheckFailed, match=line):
        verdict.require_passed(result)


@pytest.mark.parametrize("fault", [*MALFORMED, "stream not JSON", "stream not UTF-8"])
def test_malformed_answers_fail_with_a_sentence(fault):
    with broken(fault) as url:
        result = judge(url)
    failed = [c for c in result.checks if c.status == "fail"]
    assert len(result.checks) == len(SMOKE) and {c.name for c in failed} & {"chat", "streaming"}
    assert all(c.detail and "Error" not in c.detail for c in failed)


def test_junk_anywhere_in_the_answers_never_ends_the_verdict():
    for seed in range(40):
        with broken(dice=random.Random(seed)) as url:
            result = judge(url)
        assert [c.name for c in result.checks] == list(SMOKE), seed


@pytest.mark.parametrize(
    ("fault", "line", "status"),
    [
        ("no completions", "completions", "not_offered"),
        ("no schema", "json_schema", "not_offered"),
        ("stream not offered", "streaming", "not_offered"),
        ("always greedy", "seed", "not_shown"),
    ],
)
def test_what_is_not_offered_or_not_shown_is_neither_passed_nor_failed(fault, line, status):
    with broken(fault) as url:
        result = judge(url)
    assert [(c.name, c.status) for c in result.checks if c.status != "pass"] == [(line, status)]
    printed = result.to_json()
    assert (printed["passed"], printed["failed"], printed[status]) == (11, 0, 1)
    assert status in result.to_html() and f"1 {status.replace('_', ' ')}" in result.summary()
    verdict.require_passed(result)
    if status == "not_offered":
        with pytest.raises(CheckFailed, match=rf"1 of 12 checks .* \({line}: not offered\)"):
            verdict.require_passed(result, refused=("fail", "not_offered"))
    else:
        verdict.require_passed(result, refused=("fail", "not_offered"))


@pytest.mark.parametrize(("model", "status"), [("confident model", "pass"), ("stubborn model", "not_shown")])
def test_a_model_that_nearly_repeats_itself_gets_one_verdict_on_the_seed_and_never_a_failure(model, status):
    statuses = set()
    for first in range(340, 600, 40):  # among the draws without a seed are rare texts
        with broken(model, unseeded=first) as url, Client(url) as client:
            statuses |= {verdict.judge(client, {"seed": SMOKE["seed"]}).checks[0].status for _ in range(2)}
    assert statuses == {status}


def test_verdict_files_and_command(tmp_path):
    import typer

    from microlm.cli.serve import verify as command

    app = typer.Typer()
    app.command()(command)
    with broken("no DONE") as url:
        done = CliRunner().invoke(app, [url, "--smoke", "--json", "--out", str(tmp_path)])
    printed = json.loads(done.stdout.splitlines()[0])
    assert isinstance(done.exception, CheckFailed) and done.exit_code == 1
    assert printed == json.loads((tmp_path / "verdict.json").read_text())
    assert (printed["schema"], printed["passed"], printed["failed"], printed["not_offered"]) == (2, 11, 1, 0)
    assert set(printed["checks"][0]) == {"name", "status", "detail", "seconds"}
    page = (tmp_path / "verdict.html").read_text()
    assert "streaming" in page and "[DONE]" in page and "http-equiv" in page and "src=" not in page


@pytest.mark.parametrize(
    ("fault", "lines"),
    [
        ("stream without end", {"unicode", "streaming"}),
        ("pings without end", {"unicode", "streaming"}),
        ("spaces without end", set(SMOKE) - {"health", "models", "errors", "completions"}),
    ],
)
def test_an_answer_without_end_fails_within_the_limit(fault, lines):
    with broken(fault) as url, Client(url, timeout_s=1) as client:
        result = verdict.judge(client, SMOKE)
    failed = {c.name: (c.detail, c.seconds) for c in result.checks if c.status == "fail"}
    assert set(failed) == lines
    assert all("did not end within 1 s" in d and s < 4 for d, s in failed.values())


def test_nobody_there_is_one_sentence():
    with pytest.raises(UserError, match="cannot connect"):
        judge("http://127.0.0.1:9")


def test_our_server_on_a_random_model_passes_every_line(tmp_path):
    with run_model(write_tiny_model(tmp_path / "m")) as running, Client(running.url) as client:
        result = verdict.judge(client, SMOKE)
    assert [(c.name, c.status, c.detail) for c in result.checks if c.status != "pass"] == []
    assert "came out whole" in result.checks[4].detail


def test_a_wrong_key_stops_at_once(tmp_path):
    with run_model(write_tiny_model(tmp_path / "m"), api_key="right-key-1234") as running:
        with (
            Client(running.url, "wrong-key-1234") as client,
            pytest.raises(UserError, match="--api-key-file"),
        ):
            verdict.judge(client, SMOKE)
        with Client(running.url, "right-key-1234") as client:
            assert verdict.judge(client, SMOKE).count("fail") == 0


def test_verify_needs_no_torch():
    code = (
        "import sys; import microlm.eval.verify.smoke, microlm.eval.verify.stage, microlm.serve.launch;"
        "print([m for m in ('torch', 'transformers', 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
