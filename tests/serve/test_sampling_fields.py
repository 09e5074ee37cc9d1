"""The fields that say how to draw: what is served = what the engine answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from microlm.core.records import Constraint, Message, Sampling
from microlm.engine import Engine

HTTP = httpx.Client(timeout=60)
ASKED = [Message("user", "李白?")]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "李白?"}], "max_tokens": 12}
RAW = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def engine(server: Any) -> Engine:
    """The served model in an engine of its own."""
    return Engine(server.engine.directory, max_seqs=2)


def post(server: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = HTTP.post(server.url + path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(server: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = HTTP.post(server.url + path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        (
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        ),
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        (
            {"logit_bias": {"30": 50, "31": 49.5}, "seed": 3},
            {"logit_bias": ((30, 50.0), (31, 49.5)), "seed": 3},
        ),
        ({"temperature": 1, "min_p": 0.4, "seed": 5}, {"temperature": 1.0, "min_p": 0.4, "seed": 5}),
        ({"structured_outputs": {"regex": "[a-f]{6}"}}, {"constraint": Constraint("regex", "[a-f]{6}")}),
        (
            {"structured_outputs": {"choice": ["yes", "no"]}},
            {"constraint": Constraint("choice", '["yes","no"]')},
        ),
        (
            {"structured_outputs": {"grammar": 'start: "x" /[0-9]/ "y"'}},
            {"constraint": Constraint("grammar", 'start: "x" /[0-9]/ "y"')},
        ),
        (
            {"structured_outputs": {"json": {"const": [1]}}},
            {"constraint": Constraint("json_schema", '{"const": [1]}')},
        ),
        ({"copy_from": "a text"}, {"constraint": Constraint("copy", copy_from="a text")}),
    ],
)
def test_fields_reach_the_engine(server: Any, engine: Engine, fields: dict[str, Any], own: Any) -> None:
    defaults: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
    expected = engine.generate([ASKED], Sampling(**(defaults | own)))[0]
    got = post(server, "/v1/chat/completions", CHAT | {"temperature": 0} | fields)["choices"][0]
    assert (got["message"]["content"], got["finish_reason"]) == (expected.text, expected.finish_reason)
    assert expected.text != engine.generate([ASKED], Sampling(**defaults))[0].text


def test_log_probabilities_of_a_chat(server: Any, engine: Engine) -> None:
    known = engine.generate([ASKED], Sampling(max_tokens=12, logprobs=2))[0].logprobs
    assert known is not None and len(known) == 12
    body = CHAT | {"temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = post(server, "/v1/chat/completions", body)["choices"][0]
    told = answer["logprobs"]["content"]
    assert (
        b"".join(bytes(t["bytes"]) for t in told).decode("utf-8", "replace") == answer["message"]["content"]
    )
    for one, exact in zip(told, known, strict=True):
        assert one["logprob"] == pytest.approx(exact.logprob, abs=1e-4)
        assert [t["logprob"] for t in one["top_logprobs"]] == pytest.approx(
            [v for _, v in exact.top], abs=1e-4
        )
        assert one["token"] == one["top_logprobs"][0]["token"]  # greedy takes the likeliest
    streamed = [
        c for e in events(server, "/v1/chat/completions", body) for c in e["choices"] if c["logprobs"]
    ]
    assert [t for c in streamed for t in c["logprobs"]["content"]] == told
    without = post(server, "/v1/chat/completions", CHAT | {"temperature": 0, "logprobs": False})
    assert without["choices"][0]["logprobs"] is None


def test_log_probabilities_of_a_completion(server: Any, engine: Engine) -> None:
    known = engine.generate(["abc"], Sampling(max_tokens=12, logprobs=3))[0].logprobs
    assert known is not None
    told = post(server, "/v1/completions", RAW | {"logprobs": 3})["choices"][0]["logprobs"]
    assert told["token_logprobs"] == pytest.approx([k.logprob for k in known], abs=1e-4)
    assert [len(t) for t in told["top_logprobs"]] == [3] * 12
    assert told["text_offset"] == [len("".join(told["tokens"][:i])) for i in range(12)]
    parts = [
        c["logprobs"] for e in events(server, "/v1/completions", RAW | {"logprobs": 3}) for c in e["choices"]
    ]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [value for part in parts if part for value in part[name]] == told[name]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_cut_inside_its_constraint_says_so(server: Any, path: str) -> None:
    body = (CHAT if "chat" in path else RAW) | {"structured_outputs": {"regex": "[a-f]{20}"}}
    told = "the answer ended inside the pattern: max_tokens reached; raise it from 12"
    choice = post(server, path, body)["choices"][0]
    assert (choice["finish_reason"], choice["error"]) == ("length", told)
    assert events(server, path, body)[-1]["choices"][0]["error"] == told
    whole = post(server, path, body | {"structured_outputs": {"regex": "[a-f]{6}"}})["choices"][0]
    assert whole["finish_reason"] == "stop" and "error" not in whole
