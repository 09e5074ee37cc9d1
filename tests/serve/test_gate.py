"""The door's refusals: key, Host, size, slow senders, bad bodies, a full queue; in OpenAI's error shape."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
from serving import Running, run_model
from tiny_model import write_tiny_model

from microlm.core.endpoint import read_key
from microlm.core.errors import UserError
from microlm.serve import listen
from microlm.serve.gate import Limits
from microlm.serve.server import create_app

HTTP = httpx.Client(timeout=120)
KEY = "key-for-the-tests-8d1f"
CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def check_error(response: httpx.Response, status: int, code: str | None = None) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert code is None or error["code"] == code
    return error


def post(server: Running, body, path: str = CHAT, **kwargs) -> httpx.Response:
    return HTTP.post(server.url + path, json=body, **kwargs)


CALLED = {"name": "add", "arguments": '{"numbers": [2, 2]}'}
HOSTILE = {
    "no model": {"messages": BODY["messages"]},
    "no messages": {"model": "tiny"},
    "empty messages": BODY | {"messages": []},
    "messages text": BODY | {"messages": "hi"},
    "role": BODY | {"messages": [{"role": "bot", "content": "x"}]},
    "function role": BODY | {"messages": [{"role": "function", "content": "x", "name": "f"}]},
    "tool calls of a user": BODY
    | {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": CALLED}]}]},
    "arguments that are no object": BODY
    | {"messages": [{"role": "assistant", "tool_calls": [{"function": CALLED | {"arguments": "[1]"}}]}]},
    "a tool without a name": BODY | {"tools": [{"type": "function"}], "tool_choice": "none"},
    "no content": BODY | {"messages": [{"role": "user"}]},
    "null content": BODY | {"messages": [{"role": "user", "content": None}]},
    "picture": BODY
    | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "tool calls": BODY | {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
    "surrogate": BODY | {"messages": [{"role": "user", "content": "\ud800"}]},
    "surrogate part": BODY
    | {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]},
    "surrogate model": BODY | {"model": "\ud800"},
    "temperature text": BODY | {"temperature": "0.5"},
    "temperature true": BODY | {"temperature": True},
    "temperature high": BODY | {"temperature": 2.1},
    "temperature low": BODY | {"temperature": -0.1},
    "top_p zero": BODY | {"top_p": 0},
    "top_p high": BODY | {"top_p": 1.5},
    "top_k negative": BODY | {"top_k": -1},
    "max_tokens zero": BODY | {"max_tokens": 0},
    "max_tokens negative": BODY | {"max_tokens": -5},
    "max_tokens huge": BODY | {"max_tokens": 10**30},
    "max_tokens half": BODY | {"max_tokens": 1.5},
    "n zero": BODY | {"n": 0},
    "n nine": BODY | {"n": 9},
    "seed huge": BODY | {"seed": 2**63},
    "seed text": BODY | {"seed": "abc"},
    "stop empty": BODY | {"stop": ""},
    "stop number": BODY | {"stop": 5},
    "stop many": BODY | {"stop": ["x"] * 17},
    "stop long": BODY | {"stop": "x" * 257},
    "stream text": BODY | {"stream": "yes"},
    "stream options alone": BODY | {"stream_options": {"include_usage": True}},
    "stream options other": BODY | {"stream": True, "stream_options": {"x": 1}},
    "format type": BODY | {"response_format": {"type": "xml"}},
    "format without schema": BODY | {"response_format": {"type": "json_schema"}},
    "schema is no object": BODY
    | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
    "schema unsatisfiable": BODY
    | {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "nothing"}},
        }
    },
    "schema surrogate": BODY
    | {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"const": "\ud800"}},
        }
    },
    "tools": BODY | {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "tool choice": BODY | {"tool_choice": "required"},
    "top logprobs alone": BODY | {"top_logprobs": 2},
    "top logprobs": BODY | {"logprobs": True, "top_logprobs": 21},
    "penalty": BODY | {"presence_penalty": 2.5},
    "logit bias": BODY | {"logit_bias": {"5": 101}},
    "bias of no token": BODY | {"logit_bias": {"99999": 1}},
    "two constraints": BODY | {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    "constraint twice": BODY
    | {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
    "no pattern": BODY | {"structured_outputs": {"regex": "(a"}},
    "unknown": BODY | {"best": 1},
    "a list": [],
    "a text": "x",
    "null": None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_400_in_shape(server, name):
    raw = json.dumps(HOSTILE[name]).encode()
    response = HTTP.post(server.url + CHAT, content=raw, headers={"Content-Type": "application/json"})
    assert check_error(response, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"temperature": 1e999, "model": "tiny", "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": NaN, "model": "tiny", "messages": [{"role": "user", "content": "x"}]}',
        b"[" * 100_000,
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_bytes_that_are_no_request(server, raw):
    response = HTTP.post(server.url + CHAT, content=raw, headers={"Content-Type": "application/json"})
    check_error(response, 400)


def test_neutral_values_of_unsupported_parameters_pass(server):
    neutral = {
        "tools": [],
        "logprobs": False,
        "presence_penalty": 0,
        "logit_bias": {},
        "n": None,
        "stop": None,
    }
    assert (
        post(server, BODY | neutral | {"tool_choice": None, "response_format": {"type": "text"}}).status_code
        == 200
    )


def test_another_content_type_is_refused(server):
    """A page of another origin may post text/plain without asking the browser; it gets nothing here."""
    raw = json.dumps(BODY).encode()
    check_error(HTTP.post(server.url + CHAT, content=raw, headers={"Content-Type": "text/plain"}), 400)


def test_unknown_route_wrong_method_and_completion_prompts(server):
    check_error(HTTP.get(server.url + "/nothing"), 404)
    check_error(HTTP.get(server.url + CHAT), 405)
    check_error(HTTP.get(server.url + "/docs"), 404)
    check_error(HTTP.get(server.url + "/v1/models/other"), 404, "model_not_found")
    for prompt in ("", [], [[]], [999_999], [-1], ["a", 1], "x" * 600, ["a"] * 33, {"a": 1}, None, [True]):
        check_error(post(server, {"model": "tiny", "prompt": prompt}, "/v1/completions"), 400)


def test_every_route_but_health_wants_the_key(model_dir, server):
    app = create_app(server.engine, "tiny", KEY)
    routes = [(min(r.methods), r.path) for r in app.routes if hasattr(r, "methods")]
    assert len(routes) >= 5
    with run_model(model_dir, api_key=KEY) as locked:
        for method, path in [*routes, ("GET", "/nothing"), ("OPTIONS", CHAT)]:
            url = locked.url + path.replace("{name:path}", "tiny")
            for header in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": KEY},
                {"Authorization": "Bearer " + KEY + "x"},
            ):
                response = HTTP.request(method, url, headers=header)
                if path == "/health":
                    assert response.status_code == 200
                else:
                    check_error(response, 401, "invalid_api_key")
        assert (
            HTTP.get(locked.url + "/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        )
        check_error(HTTP.get(locked.url + "/v1/models", headers={"Authorization": b"Bearer \xff\xe9"}), 401)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.5", ""]
)
def test_foreign_host_header_is_refused(server, host):
    check_error(HTTP.get(server.url + "/health", headers={"Host": host}), 403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST"])
def test_loopback_host_header_passes(server, host):
    assert HTTP.get(server.url + "/health", headers={"Host": host}).status_code == 200


def test_no_cors_header_is_ever_sent(server):
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for response in (HTTP.options(server.url + CHAT, headers=origin), post(server, BODY, headers=origin)):
        assert not [h for h in response.headers if h.startswith("access-control")]


def test_body_limit_while_reading_and_slow_senders(model_dir):
    limits = Limits(max_body_bytes=2000, body_timeout_s=0.3)
    with run_model(model_dir, limits=limits) as small:
        check_error(post(small, BODY | {"user": "x" * 3000}), 413, "request_too_large")
        chunks = (b"x" * 1000 for _ in range(5))  # chunked: no length is declared
        check_error(HTTP.post(small.url + CHAT, content=chunks), 413, "request_too_large")
        parts = urlsplit(small.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=5) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(4096)
        assert post(small, BODY).status_code == 200


def test_a_full_queue_is_429_at_once_with_retry_after(tmp_path):
    directory = write_tiny_model(tmp_path / "long", window=1100)
    with run_model(directory, limits=Limits(max_queue=1), max_seqs=1) as small:
        endless = BODY | {"max_tokens": 1000, "ignore_eos": True}
        threads = [threading.Thread(target=post, args=(small, endless)) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: small.engine.free_slots == 0 and small.engine._scheduler.waiting)
        refused = post(small, BODY)
        assert small.engine.free_slots == 0  # it did not wait for its turn
        error = check_error(refused, 429, "queue_full")
        assert int(refused.headers["Retry-After"]) >= 1 and error["type"] == "rate_limit_error"
        check_error(post(small, BODY | {"n": 8}), 429)
        for thread in threads:
            thread.join()
        assert post(small, BODY).status_code == 200
        until(lambda: small.engine.free_slots == 1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(server, stream):
    body = BODY | {"max_tokens": 480, "ignore_eos": True, "stream": stream, "n": 2}
    parts = urlsplit(server.url)
    raw = json.dumps(body).encode()
    kind = "Host: localhost\r\nContent-Type: application/json"
    head = f"POST {CHAT} HTTP/1.1\r\n{kind}\r\nContent-Length: {len(raw)}\r\n\r\n"
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as leaver:
        leaver.sendall(head.encode() + raw)
        until(lambda: server.engine.free_slots == 2)
    until(lambda: server.engine.free_slots == 4)


def test_prompts_and_keys_are_in_no_log(model_dir, caplog, capfd):
    canary = "canary-7f3a"
    caplog.set_level(logging.DEBUG)
    with run_model(model_dir, api_key=KEY) as locked:
        header = {"Authorization": f"Bearer {KEY}"}
        said = BODY | {"messages": [{"role": "user", "content": canary}], "user": canary}
        assert post(locked, said, headers=header).status_code == 200
        post(locked, said, headers={"Authorization": f"Bearer {canary}"})
        post(locked, said | {canary: 1}, headers=header)
        post(locked, said | {"temperature": canary}, headers=header)
        HTTP.get(f"{locked.url}/{canary}?q={canary}", headers=header)
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert any("/v1/chat/completions 200" in line for line in ours)
    text = "\n".join(ours) + "".join(capfd.readouterr())
    assert canary not in text and KEY not in text


def test_a_public_address_needs_a_key():
    for host in ("0.0.0.0", "::", "", "192.168.1.5", "example.org"):
        with pytest.raises(UserError, match="key"):
            listen.check_exposure(host, None)
        listen.check_exposure(host, KEY)
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        listen.check_exposure(host, None)
        with pytest.raises(UserError, match="shorter than 8"):
            listen.check_exposure(host, "short")


def test_key_file(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text(f"  {KEY}\n")
    assert read_key(file) == KEY
    monkeypatch.setenv("MICROLM_API_KEY", "another-key-9")
    assert read_key(None) == "another-key-9" and read_key(file) == KEY
    monkeypatch.delenv("MICROLM_API_KEY")
    assert read_key(None) is None
    for bad in ("", "two words here", "schlüssel-schlüssel"):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(UserError, match=str(file)) as e:
            read_key(file)
        assert not bad or bad not in str(e.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "none")


def test_bind_says_what_is_wrong(server):
    port = urlsplit(server.url).port
    for host, wrong, word in (
        ("127.0.0.1", port, "in use"),
        ("127.0.0.1", 70_000, "65535"),
        ("no.such.invalid", 0, "no such"),
    ):
        with pytest.raises(UserError, match=word):
            listen.bind(host, wrong)


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
