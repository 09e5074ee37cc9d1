"""Joining, ending, cancelling: what one request may do to its own end and never to another's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_model import WINDOW, write_model

from microlm.core.errors import UserError
from microlm.core.records import Constraint, Message, Sampling
from microlm.engine import Busy, Engine, EngineService, Stopped, postprocess
from microlm.engine.batch import Ask, finished
from microlm.engine.forward.batch import StepBatch
from microlm.engine.output import TextStream

LONG = Sampling(max_tokens=100, ignore_eos=True)


def test_a_request_added_in_mid_decode_joins_at_the_next_step(engine: Engine) -> None:
    first = engine.add("李白", LONG)
    for _ in range(5):
        assert [r for r, _ in engine.step()] == [first]
    second = engine.add("hello", LONG)
    assert [(r, len(d.token_ids)) for r, d in engine.step()] == [(first, 1), (second, 1)]
    assert (len(first.output), len(second.output)) == (6, 1)


def test_more_requests_than_slots_wait_in_order(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_seqs=2)
    requests = [engine.add("a", replace(LONG, max_tokens=3)) for _ in range(5)]
    seen = []
    while engine.busy:
        seen.append([requests.index(r) for r, _ in engine.step()])
    assert [sorted(s) for s in seen] == [[0, 1]] * 3 + [[2, 3]] * 3 + [[4]] * 3


@pytest.mark.slow
def test_hundred_cancellations_leave_all_slots_free(engine: Engine) -> None:
    expected = engine.generate(["李白"], LONG)
    for i in range(100):
        stream = engine.stream("hello" * (i % 7 + 1), LONG)
        for _ in range(i % 4):
            next(stream)
        if i % 3 == 0:
            waiting = engine.add("诗人", LONG)
            engine.step()
            engine.cancel(waiting)
            assert waiting.finish_reason == "cancelled"
        stream.close()
    assert engine.free_slots == engine.max_seqs and not engine.busy
    assert engine.generate(["李白"], LONG) == expected


def test_an_interrupted_generate_frees_everything(engine: Engine) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(["a"] * 20, [replace(LONG, max_tokens=1 + i) for i in range(20)], interrupt)
    assert engine.free_slots == engine.max_seqs and not engine.busy


def test_progress_counts_every_prompt_once(engine: Engine) -> None:
    heard: list[int] = []
    engine.generate(["a"] * 20, [replace(LONG, max_tokens=1 + i) for i in range(20)], heard.append)
    assert sum(heard) == 20


def test_the_window_bounds_prompt_and_answer_together(engine: Engine) -> None:
    full = [5] * WINDOW
    only = engine.generate([full[: WINDOW - 1]], LONG)[0]
    assert (len(only.token_ids), only.finish_reason) == (1, "length")
    cut = engine.generate([full[:100]], LONG)[0]
    assert (len(cut.token_ids), cut.finish_reason) == (WINDOW - 100, "length")
    for length in (WINDOW, WINDOW + 1):
        with pytest.raises(UserError, match=f"{length} tokens, but the window is {WINDOW}"):
            engine.add([5] * length, LONG)


def test_a_shorter_window_cuts_earlier(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_seq_len=20)
    assert len(engine.generate([[5] * 15], LONG)[0].token_ids) == 5
    page = 32 * 2 * 2 * 2 * 8 * 4  # tokens, k and v, layers, heads, size, bytes
    assert engine.cache_bytes == (8 + 1) * page  # a page for each request, one for padding
    with pytest.raises(UserError, match="window of 128"):
        make_engine(max_seq_len=129)


def test_memory_is_bounded_and_known_before(make_engine: Callable[..., Engine]) -> None:
    page = 32 * 2 * 2 * 2 * 8 * 4
    engine = make_engine(kv_memory=4 * page + 7)
    assert (engine.cache_bytes, engine.max_seq_len) == (4 * page, 3 * 32)
    assert make_engine(kv_memory=100 * page, max_seqs=2).cache_bytes == (2 * 4 + 1) * page
    with pytest.raises(UserError, match=r"kv_memory: .* GiB are free"):
        make_engine(kv_memory=10**18)
    with pytest.raises(UserError, match="kv_memory: one sequence of 128 tokens needs"):
        make_engine(kv_memory=4 * page, max_seq_len=128)


def test_a_stop_string_is_found_across_tokens(engine: Engine) -> None:
    whole = engine.generate(["hello"], replace(LONG, max_tokens=60))[0]
    for start in range(0, len(whole.text) - 4, 3):
        stop = whole.text[start : start + 4]
        got = engine.generate(["hello"], replace(LONG, max_tokens=60, stop=(stop, "never there")))[0]
        assert got.text == whole.text[: whole.text.index(stop)]
        assert got.finish_reason == "stop"
        assert got.token_ids == whole.token_ids[: len(got.token_ids)]


def test_held_back_text_is_released_when_the_stop_does_not_come(engine: Engine) -> None:
    tokenizer, text = engine.tokenizer, "abcabd李白😀"
    for stop in (("abd李黑",), ("bcx", "😀😀")):
        stream = TextStream(tokenizer, stop)
        pieces = [stream.push(i) for i in tokenizer.encode(text)]
        assert "".join(pieces) + stream.finish() == text


def test_every_valid_text_streams_without_replacement_characters(engine: Engine) -> None:
    text = "李白是诗人。emoji 😀👩‍👩‍👧 and ελληνικά, 한국어 𠀀"
    for stop in ((), ("zzz",)):
        stream = TextStream(engine.tokenizer, stop)
        pieces = [stream.push(i) for i in engine.tokenizer.encode(text)]
        assert "".join(pieces) + stream.finish() == text
        assert not any("�" in p for p in pieces)


def test_eos_ends_and_is_not_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter([5, 6, engine.tokenizer.eos_id])
    monkeypatch.setattr("microlm.engine.postprocess.draw", lambda *_: next(tokens))
    got = engine.generate(["a"], Sampling(max_tokens=10))[0]
    assert got.token_ids == (5, 6, engine.tokenizer.eos_id)
    assert (got.finish_reason, got.text) == ("stop", engine.tokenizer.decode([5, 6]))


def test_non_finite_scores_end_only_that_request(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama")
    engine = Engine(folder, max_seqs=3)
    good = engine.generate([[10, 11]], LONG)
    embedding = engine._runner.decoder.model.embed_tokens.weight
    with torch.no_grad():
        embedding[300] = float("nan")
    sampled = replace(LONG, temperature=1.0, seed=1)
    got = engine.generate([[10, 11], [10, 300, 11], [10, 11]], [LONG, sampled, LONG])
    assert got[1].finish_reason == "error" and "finite" in got[1].error
    assert [got[0], got[2]] == [*good, *good]
    assert engine.generate([[10, 11]] * 3, LONG) == good * 3  # the slot that held NaN is clean again


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ("", Sampling(), "empty"),
        ([], Sampling(), "empty"),
        ([Message("user", "a\ud800")], Sampling(), "surrogate"),
        ([1, 9999], Sampling(), "id"),
        ([-1], Sampling(), "id"),
        ("a", Sampling(temperature=-1), "temperature"),
        ("a", Sampling(temperature=float("nan")), "temperature"),
        ("a", Sampling(top_p=0.0), "top_p"),
        ("a", Sampling(top_k=-1), "top_k"),
        ("a", Sampling(max_tokens=0), "max_tokens"),
        ("a", Sampling(seed=-1), "seed"),
        ("a", Sampling(seed=2**64), "seed"),
        ("a", Sampling(seed=1.5), "seed: 1.5 is not a whole"),  # type: ignore[arg-type]
        ("a", Sampling(stop="abc"), "stop: 'abc' is one text"),  # type: ignore[arg-type]
        (None, Sampling(), "found NoneType"),
        (b"abc", Sampling(), "expected a text, messages or ids, found bytes"),
        ([5, 6.0], Sampling(), "every id must be a whole number"),
        ("a", Sampling(stop=("",)), "stop"),
    ],
)
def test_what_cannot_run_is_a_sentence(
    engine: Engine, prompt: object, sampling: Sampling, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        engine.add(prompt, sampling)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prompt 2 of 2"):
        engine.generate(["a", prompt], [Sampling(), sampling])  # type: ignore[list-item]
    assert not engine.busy


@pytest.mark.parametrize("penalty", [1e-60, 1e-44, 0.0, 1e300, float("nan")])
def test_a_penalty_that_leaves_float32_is_refused(engine: Engine, penalty: float) -> None:
    with pytest.raises(UserError, match=r"repetition_penalty: .* is not between"):
        engine.add("a", Sampling(repetition_penalty=penalty))


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_strongest_penalties_draw(engine: Engine, penalty: float) -> None:
    strong = Sampling(20, 1.0, 0.9, seed=1, min_p=0.1, repetition_penalty=penalty, logit_bias=((5, 100.0),))
    assert engine.generate(["hello"], strong)[0].finish_reason in ("stop", "length")


def test_a_draw_that_fails_ends_its_own_request_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate(["hello"], replace(LONG, max_tokens=9))
    real = postprocess.draw

    def failing(scores: np.ndarray, sampling: Sampling, random: object) -> int:
        if sampling.seed == 7:
            raise ValueError("my password")
        return real(scores, sampling, random)  # type: ignore[arg-type]

    monkeypatch.setattr(postprocess, "draw", failing)
    bad = replace(LONG, seed=7, temperature=1.0)
    got = engine.generate(
        ["hello", "a", "hello"], [replace(LONG, max_tokens=9), bad, replace(LONG, max_tokens=9)]
    )
    assert [got[0], got[2]] == expected * 2
    assert (got[1].finish_reason, got[1].error) == ("error", "drawing failed (ValueError)")
    assert engine.free_slots == engine.max_seqs and engine.used_pages == 0


def test_a_stop_string_inside_a_constraint_is_told(engine: Engine) -> None:
    letters = Sampling(60, 1.0, seed=3, constraint=Constraint("regex", "[ab]{20}"), stop=("a",))
    cut = engine.generate(["x"], letters)[0]
    assert (cut.finish_reason, cut.error) == ("stop", "the answer ended inside the pattern: at a stop string")
    lines = replace(letters, constraint=Constraint("regex", r"[ab]{3}(\n[ab]{3})*"), stop=("\n",))
    whole = engine.generate(["x"], replace(lines, n=8))
    assert {c.error for c in whole} == {""} and all(len(c.text) == 3 for c in whole)


def test_a_stream_whose_steps_others_make_ends(engine: Engine) -> None:
    short = replace(LONG, max_tokens=12)
    expected = engine.generate(["hello"], short)[0].text
    stream = engine.stream("hello", short)
    first = next(stream).text
    list(finished(engine, [Ask("a", LONG)]))
    assert first + "".join(d.text for d in stream) == expected
    stream = engine.stream("hello", short)
    next(stream)
    while engine.busy:
        engine.step()
    assert [d.finish_reason for d in stream][-1] == "length"
    request = engine.prepare("hello", short)
    stream = engine._follow(request)
    next(stream)
    engine.cancel(request)
    assert [d.finish_reason for d in stream] == ["cancelled"]


def test_three_threads_may_generate_at_once(engine: Engine) -> None:
    prompts, got = ["hello", "a", "李白"], {}
    expected = {p: engine.generate([p] * 5, replace(LONG, max_tokens=40)) for p in prompts}

    def ask(prompt: str) -> None:
        got[prompt] = engine.generate([prompt] * 5, replace(LONG, max_tokens=40))

    threads = [threading.Thread(target=ask, args=(p,), daemon=True) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == expected


def test_ids_may_be_an_array(engine: Engine) -> None:
    short = replace(LONG, max_tokens=5)
    for ids in (np.array([5, 6, 7]), list(np.array([5, 6, 7], dtype="<u2"))):
        assert engine.generate([ids], short) == engine.generate([[5, 6, 7]], short)


def test_a_stop_string_is_looked_for_though_nobody_reads_along(engine: Engine) -> None:
    request = engine.enqueue(engine.prepare("hello", replace(LONG, stop=("o",)), live=False))
    while engine.busy:
        engine.step()
    assert request.finish_reason == "stop"


@pytest.mark.parametrize(
    "options",
    [
        {"kv_dtype": "foo"}, {"dtype": "foo"}, {"quantize": "int2"}, {"threads": 10_000_000},
        {"speculate": -1}, {"max_seqs": 0}, {"max_prefill_tokens": 0},
    ],
)  # fmt: skip
def test_an_option_that_means_nothing_is_named(make_engine: Callable[..., Engine], options: dict) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(options))}: "):
        make_engine(**options)


def test_the_service_bounds_its_queue_and_frees_what_is_closed(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_seqs=2)

    async def scenario() -> None:
        service = EngineService(engine, max_queue=1)
        streams = [await service.submit("a", LONG) for _ in range(3)]
        with pytest.raises(Busy):
            await service.submit("a", LONG)
        await anext(streams[0])
        await streams[0].aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(streams[0])
        waiting = asyncio.create_task(_drain(streams[1]))
        await asyncio.sleep(0)
        waiting.cancel()
        del streams[2:]  # lost without being closed
        while service.open_requests:
            await asyncio.sleep(0.01)
        with pytest.raises(UserError):
            await service.submit("", LONG)
        assert service.open_requests == 0 and engine.free_slots == 2
        last = await service.submit("a", LONG)
        await asyncio.to_thread(service.close)
        assert (await _drain(last))[-1] == "cancelled"
        with pytest.raises(Stopped):
            await service.submit("a", LONG)

    asyncio.run(scenario())
    assert engine.free_slots == 2 and not engine.busy


def test_many_answers_are_submitted_together_or_not_at_all(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_seqs=2)
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=4, n=3)
    expected = [c.text for c in engine.generate(["hello"], sampling)]

    async def scenario() -> None:
        service = EngineService(engine, max_queue=1)
        streams = await service.submit_many("hello", sampling)
        with pytest.raises(Busy):
            await service.submit_many("hello", replace(sampling, n=2))
        texts = ["".join([d.text async for d in stream]) for stream in streams]
        assert texts == expected and service.open_requests == 0
        with pytest.raises(UserError, match="n: 0"):
            await service.submit_many("hello", replace(sampling, n=0))
        with pytest.raises(UserError, match="'a' is not loaded"):
            await service.submit("hello", sampling, adapter="a")
        assert service.open_requests == 0
        await asyncio.to_thread(service.close)

    asyncio.run(scenario())


def test_a_failing_step_is_told_to_everyone_and_the_service_lives(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    works, failures = engine._runner.forward, [ValueError("only once")]

    def forward(batch: StepBatch) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return works(batch)

    monkeypatch.setattr(engine._runner, "forward", forward)

    async def scenario() -> None:
        service = EngineService(engine)
        assert (await _drain(await service.submit("a", LONG)))[-1] == "error"
        assert (await _drain(await service.submit("a", replace(LONG, max_tokens=3))))[-1] == "length"
        assert service.failure is None
        await asyncio.to_thread(service.close)

    asyncio.run(scenario())
    assert engine.free_slots == engine.max_seqs


@pytest.mark.parametrize("broken", ["step", "enqueue"])
def test_a_broken_engine_ends_every_request_and_takes_no_more(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fall_over(*_: object) -> None:
        raise RuntimeError("the device is gone")

    async def scenario() -> None:
        service = EngineService(engine)
        streams = [await service.submit("a", LONG) for _ in range(9)]
        monkeypatch.setattr(engine, broken, fall_over)
        if broken == "enqueue":
            streams.append(await service.submit("a", LONG))
        ends = await asyncio.wait_for(asyncio.gather(*map(_drain, streams)), 20)
        assert ends[0][-1] == ends[-1][-1] == "error" and service.open_requests == 0
        while service.failure is None:
            await asyncio.sleep(0.01)
        with pytest.raises(Stopped, match="restart"):
            await service.submit("a", LONG)
        await asyncio.to_thread(service.close)

    asyncio.run(scenario())


async def _drain(stream: object) -> list[str | None]:
    return [d.finish_reason async for d in stream]  # type: ignore[attr-defined]
