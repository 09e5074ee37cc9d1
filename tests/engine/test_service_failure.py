"""A step that fails half-way: its requests end and free their slots, and nobody reads what another wrote."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace

import pytest

from microlm.core.records import Sampling
from microlm.engine import Engine, EngineService
from microlm.engine.postprocess import _Gain
from microlm.engine.request import Delta, Request

LONG = Sampling(max_tokens=90, ignore_eos=True)
SHORT = replace(LONG, max_tokens=3)
SECRET = "my password is 李白诗"


def fail_half_way(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """In the first step of two requests the first one ends, then the second one's token raises.

    A lone request waits for the event that is returned, so that both are there in time.
    """
    postprocess = engine._postprocess
    end, both, failed = postprocess._delta, threading.Event(), threading.Event()

    def failing(request: Request, gain: _Gain) -> Delta:
        running = engine._scheduler.running
        if not failed.is_set():
            if len(running) == 1:
                assert both.wait(20)
            elif request is running[0]:
                gain.reason = "stop"
            else:
                failed.set()
                raise ValueError(SECRET)
        return end(request, gain)

    monkeypatch.setattr(postprocess, "_delta", failing)
    return both


async def drain(stream: object) -> list[Delta]:
    return [delta async for delta in stream]  # type: ignore[attr-defined]


async def ask_two(service: EngineService, both: threading.Event) -> list[Delta]:
    """The last deltas of two requests that meet in the failing step."""
    streams = [await service.submit(SECRET, LONG) for _ in range(2)]
    both.set()
    answers = await asyncio.wait_for(asyncio.gather(*map(drain, streams)), 20)
    return [answer[-1] for answer in answers]


def test_a_cancelled_request_leaves_its_slot_though_it_ended_in_a_failed_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate(["a"], LONG)
    fail_half_way(engine, monkeypatch)
    requests = [engine.add(prompt, LONG) for prompt in ("a", "hello")]
    with pytest.raises(ValueError, match="password"):
        engine.step()
    for request in requests:
        engine.cancel(request)
    assert [r.finish_reason for r in requests] == ["stop", "cancelled"]
    assert engine.free_slots == engine.max_seqs and not engine.busy
    assert engine.generate(["a"], LONG) == expected


def test_a_step_that_fails_half_way_ends_its_requests_and_later_ones_are_served(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate(["a"], LONG)[0].text
    both = fail_half_way(engine, monkeypatch)

    async def scenario() -> None:
        service = EngineService(engine)
        assert [d.finish_reason for d in await ask_two(service, both)] == ["error", "error"]
        later = await asyncio.wait_for(drain(await service.submit("a", LONG)), 20)
        assert "".join(d.text for d in later) == expected and later[-1].finish_reason == "length"
        assert service.failure is None and service.open_requests == 0
        await asyncio.to_thread(service.close)

    asyncio.run(scenario())
    assert engine.free_slots == engine.max_seqs and not engine.busy


def test_an_engine_that_does_not_let_go_of_failed_requests_is_not_used_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = fail_half_way(engine, monkeypatch)
    monkeypatch.setattr(engine, "cancel", lambda request: None)

    async def scenario() -> None:
        service = EngineService(engine)
        assert [d.finish_reason for d in await ask_two(service, both)] == ["error", "error"]
        await asyncio.to_thread(service._thread.join, 20)
        assert service.failure and "restart" in service.failure and service.open_requests == 0

    asyncio.run(scenario())


def test_what_an_exception_says_reaches_neither_the_answers_nor_the_log(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    both = fail_half_way(engine, monkeypatch)

    async def scenario() -> list[str]:
        service = EngineService(engine)
        errors = [d.error for d in await ask_two(service, both)]
        await asyncio.to_thread(service.close)
        return errors

    with caplog.at_level(logging.DEBUG):
        errors = asyncio.run(scenario())
    assert errors == ["the engine failed (ValueError)"] * 2
    assert "ValueError" in caplog.text and "password" not in caplog.text
