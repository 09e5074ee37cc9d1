"""A broken engine: nobody waits for an answer that cannot come, and /health says so."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Running, run_model

from microlm.core.client import Client, EndpointError
from microlm.core.records import Message, Sampling

HELLO = (Message("user", "Hello"),)
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400}
ENDLESS = {"ignore_eos": True, "temperature": 0}


def post(server: Running, stream: bool = False) -> httpx.Response:
    body = BODY | ENDLESS | {"stream": stream}
    return httpx.post(server.url + "/v1/chat/completions", json=body, timeout=20)


def fall_over(*_: Any, **__: Any) -> None:
    raise RuntimeError("a device that is gone")


def slow_down(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 20 ms, so that a request of 400 tokens is still open when the next ones come."""
    forward = server.engine._runner.forward

    def slowly(batch: Any) -> Any:
        time.sleep(0.02)
        return forward(batch)

    monkeypatch.setattr(server.engine._runner, "forward", slowly)


def break_decoder(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lost device looks like: every pass raises."""
    monkeypatch.setattr(server.engine._runner, "forward", fall_over)


def break_bookkeeping(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending the requests of a failed step fails too."""
    break_decoder(server, monkeypatch)
    monkeypatch.setattr(server.engine, "cancel", fall_over)


@pytest.mark.parametrize("break_engine", [break_decoder, break_bookkeeping])
def test_open_requests_end_new_ones_are_503_and_so_is_health(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, break_engine: Any
) -> None:
    with run_model(model_dir, max_seqs=2) as server, Client(server.url, timeout_s=20) as client:
        assert httpx.get(server.url + "/health").json() == {"status": "ok"}
        slow_down(server, monkeypatch)
        stream = client.chat_stream(HELLO, Sampling(max_tokens=400, ignore_eos=True))
        next(stream)
        answers: list[httpx.Response] = []
        waiting = [threading.Thread(target=lambda: answers.append(post(server))) for _ in range(3)]
        for thread in waiting:
            thread.start()
        until_open(server, 4)
        break_engine(server, monkeypatch)
        with pytest.raises(EndpointError, match="the engine failed"):
            list(stream)
        for thread in waiting:
            thread.join(20)
        assert sorted(a.status_code for a in answers) == [500] * 3
        assert all("the engine failed" in a.json()["error"]["message"] for a in answers)
        check_closed(server)


def check_closed(server: Running) -> None:
    deadline = time.monotonic() + 5  # the errors are told first, then the state changes
    while (health := httpx.get(server.url + "/health")).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert health.status_code == 503 and health.json()["status"] == "failed"
    started = time.monotonic()
    for stream in (False, True):
        refused = post(server, stream)
        assert refused.status_code == 503 and "restart" in refused.json()["error"]["message"]
    assert time.monotonic() - started < 5


def until_open(server: Running, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(server.engine._scheduler.running) + len(server.engine._scheduler.waiting) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)
