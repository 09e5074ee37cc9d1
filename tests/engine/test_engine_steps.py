"""What a step runs: newcomers join, long prompts stall nobody, pages are shared and given back."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from random_model import write_model

from microlm.core.records import Completion, Sampling
from microlm.engine import Engine, Request
from microlm.engine.cache.store import PAGE
from microlm.engine.scheduler import Work

GREEDY = Sampling(max_tokens=60, ignore_eos=True)
DRAWN = Sampling(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True)
WINDOW = 512


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama directory with a window of 512."""
    return write_model(tmp_path_factory.mktemp("long"), "llama", seed=1, window=WINDOW)


@pytest.fixture(params=["native", "torch"])
def make_long(request: pytest.FixtureRequest, long_model: Path) -> Callable[..., Engine]:
    """Engines over it, by the native kernel and by torch alone."""
    native = request.param == "native"
    return lambda **options: Engine(long_model, **({"max_seqs": 8, "native": native} | options))


def ids(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 320) for _ in range(count)]


def answer(completion: Completion) -> Completion:
    """All but what the cache held, which is no part of the answer."""
    return replace(completion, cached_tokens=0)


def answers(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
    return [answer(c) for c in engine.generate(prompts, sampling)]


def traced(engine: Engine) -> list[list[tuple[Request, int, int]]]:
    """Who computes which tokens, step by step."""
    steps: list[list[tuple[Request, int, int]]] = []

    def note(work: list[Work]) -> None:
        steps.append([(w.request, w.start, w.size) for w in work])

    engine.on_step = note  # type: ignore[assignment]
    return steps


def test_the_trace_of_a_request_that_joins_in_mid_decode(make_long: Callable[..., Engine]) -> None:
    engine = make_long(max_prefill_tokens=40)
    steps = traced(engine)
    first = engine.add(ids(10), GREEDY)
    engine.step()
    engine.step()
    second = engine.add(ids(90, 1), GREEDY)
    for _ in range(4):
        engine.step()
    assert steps == [
        [(first, 0, 10)],
        [(first, 10, 1)],
        [(first, 11, 1), (second, 0, 39)],
        [(first, 12, 1), (second, 39, 39)],
        [(first, 13, 1), (second, 78, 12)],
        [(first, 14, 1), (second, 90, 1)],
    ]


def test_a_long_prompt_stalls_nobody(make_long: Callable[..., Engine]) -> None:
    engine = make_long(max_prefill_tokens=50)
    writer = engine.add(ids(5), replace(GREEDY, max_tokens=100))
    engine.step()
    reader = engine.add(ids(400, 2), GREEDY)
    steps = 0
    while not reader.output:
        before = len(writer.output)
        engine.step()
        steps += 1
        assert len(writer.output) == before + 1
    assert steps == -(-400 // 49)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("tokens", [1, 7, 64, 4096])
def test_a_prompt_in_pieces_equals_the_whole(
    make_long: Callable[..., Engine], tokens: int, sampling: Sampling
) -> None:
    prompts = [ids(n, n) for n in (3, 50, 130)]
    whole = answers(make_long(max_prefill_tokens=4096), prompts, sampling)
    assert answers(make_long(max_prefill_tokens=tokens), prompts, sampling) == whole


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_preempted_equals_not_preempted(make_long: Callable[..., Engine], sampling: Sampling) -> None:
    prompts, longer = [ids(40 + 9 * n, n) for n in range(8)], replace(sampling, max_tokens=150)
    calm = make_long()
    expected = answers(calm, prompts, longer)
    assert calm.preemptions == 0
    page = calm.cache_bytes // (8 * WINDOW // PAGE + 1)
    for caching in (True, False):
        pressed = make_long(kv_memory=18 * page, prefix_caching=caching)
        assert answers(pressed, prompts, longer) == expected
        assert pressed.preemptions > 3 and pressed.used_pages == 0


def test_the_latest_arrived_is_preempted_and_the_first_ends_first(make_long: Callable[..., Engine]) -> None:
    engine = make_long(kv_memory=8 * 2 * 2 * 2 * 8 * PAGE * 4, max_seqs=3)
    requests = [engine.add(ids(60, n), replace(GREEDY, max_tokens=70)) for n in range(3)]
    ended = []
    while engine.busy:
        engine.step()
        ended += [r for r in requests if r.finish_reason and r not in ended]
        assert requests[0].running or requests[0].finish_reason
    assert ended == requests and engine.preemptions


def test_prefix_cached_equals_not_cached(make_long: Callable[..., Engine]) -> None:
    system = ids(200)
    prompts = [[*system, *ids(20 + n, n)] for n in range(6)]
    prompts += [system, system[:192], system[:193], system[:70]]
    cached, plain = make_long(), make_long(prefix_caching=False)
    for sampling in (GREEDY, DRAWN):
        for prompt in prompts:
            alone = cached.generate([prompt], sampling)[0]
            assert answer(alone) == plain.generate([prompt], sampling)[0]
        again = cached.generate(prompts, sampling)
        assert [a.cached_tokens for a in again[:6]] == [192 + 32 * (20 + n > 24) for n in range(6)]
        assert [a.cached_tokens for a in again[6:]] == [192, 160, 192, 64]
        assert [answer(a) for a in again] == plain.generate(prompts, sampling)
    assert cached.used_pages == 0


def test_an_answer_is_found_by_the_next_turn(make_long: Callable[..., Engine]) -> None:
    engine = make_long()
    first = engine.generate([ids(50)], GREEDY)[0]
    turn = [*ids(50), *first.token_ids, *ids(9, 1)]
    assert engine.generate([turn], GREEDY)[0].cached_tokens == (50 + 60 - 1) // PAGE * PAGE


def test_a_shared_beginning_is_computed_once(make_long: Callable[..., Engine]) -> None:
    system = ids(150)
    engine = make_long(max_prefill_tokens=64)
    steps = traced(engine)
    got = engine.generate([[*system, *ids(10, n)] for n in range(5)], GREEDY)
    assert [c.cached_tokens for c in got] == [0, 128, 128, 128, 128]
    assert sum(count for step in steps for _, start, count in step if start < 128) == 128


def test_n_answers_share_the_prompts_pages(make_long: Callable[..., Engine]) -> None:
    engine = make_long()
    sampling = replace(DRAWN, n=4, max_tokens=20)
    requests = [engine.enqueue(r) for r in engine.prepare_many(ids(200), sampling)]
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.used_pages)
    assert most == 6 + 4  # full pages of the prompt, and one of each answer's own
    got = [engine.completion(r) for r in requests]
    each = [replace(DRAWN, max_tokens=20, seed=3 + i) for i in range(4)]
    alone = [make_long().generate([ids(200)], s)[0] for s in each]
    assert [(c.index, c.token_ids) for c in got] == [(i, c.token_ids) for i, c in enumerate(alone)]
    assert len({c.token_ids for c in got}) == 4


def test_generate_gives_answers_prompt_by_prompt(make_long: Callable[..., Engine]) -> None:
    each = [replace(DRAWN, n=2, max_tokens=5), replace(GREEDY, max_tokens=4)]
    got = make_long().generate([ids(40), ids(9, 1)], each)
    assert [(c.prompt_tokens, c.index, len(c.token_ids)) for c in got] == [(40, 0, 5), (40, 1, 5), (9, 0, 4)]


@pytest.mark.parametrize("pieces", [16, 512])
def test_prompt_logprobs_equal_the_whole_sequences(make_long: Callable[..., Engine], pieces: int) -> None:
    engine, sampling = make_long(max_prefill_tokens=pieces), replace(GREEDY, prompt_logprobs=2, max_tokens=3)
    prompts = [ids(n, n) for n in (1, 2, 33, 100)]
    engine.generate(prompts, GREEDY)  # their pages are in the cache; the scores are wanted all the same
    got = engine.generate(prompts, sampling)
    for prompt, completion, expected in zip(prompts, got, engine.logprobs(prompts), strict=True):
        assert completion.prompt_logprobs is not None and completion.prompt_logprobs[0] is None
        found = completion.prompt_logprobs[1:]
        assert [t.token_id for t in found if t] == prompt[1:] and completion.cached_tokens == 0
        assert [t.logprob for t in found if t] == pytest.approx(expected, abs=1e-4)
        assert all(t and len(t.top) == 2 for t in found)


def test_preempted_prompt_logprobs_come_once(make_long: Callable[..., Engine]) -> None:
    sampling = replace(GREEDY, prompt_logprobs=0, max_tokens=100)
    prompts = [ids(60, n) for n in range(4)]
    expected = make_long().generate(prompts, sampling)
    engine = make_long(kv_memory=12 * 2 * 2 * 2 * 8 * PAGE * 4)
    got = engine.generate(prompts, sampling)
    assert engine.preemptions and [c.token_ids for c in got] == [c.token_ids for c in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.prompt_logprobs is not None and theirs.prompt_logprobs is not None
        assert len(mine.prompt_logprobs) == 60
        pairs = zip(mine.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True)
        assert all(a and b and abs(a.logprob - b.logprob) < 1e-4 for a, b in pairs)


def test_an_abort_in_the_middle_of_a_prompt_leaves_nothing(make_long: Callable[..., Engine]) -> None:
    engine = make_long(max_prefill_tokens=64)
    other = engine.add(ids(12), GREEDY)
    long = engine.add(ids(300, 1), GREEDY)
    follower = engine.add([*ids(300, 1)[:280], 5], GREEDY)  # waits for the pages of the long one
    engine.step()
    engine.step()
    assert 0 < long.computed < 300 and not follower.running
    engine.cancel(long)
    assert (long.finish_reason, long.pages, long.output) == ("cancelled", [], [])
    while engine.busy:
        engine.step()
    expected = make_long().generate([ids(12), [*ids(300, 1)[:280], 5]], GREEDY)
    got = [engine.completion(other), engine.completion(follower)]
    assert [answer(c) for c in got] == [answer(c) for c in expected]
    assert engine.used_pages == 0


def test_thousand_cancellations_leave_no_page_and_flat_memory(long_model: Path) -> None:
    engine, rng = Engine(long_model, max_seqs=8, max_prefill_tokens=64, kv_memory=2**20), random.Random(5)
    expected = answers(engine, [ids(70)], GREEDY)

    def life(times: int) -> None:
        open_requests: list[Request] = []
        for i in range(times):
            open_requests.append(engine.add(ids(rng.randrange(1, 200), rng.randrange(40)), DRAWN))
            if i % 2:
                engine.step()
            if len(open_requests) > 6:
                engine.cancel(open_requests.pop(rng.randrange(len(open_requests))))
        for request in open_requests:
            engine.cancel(request)

    tracemalloc.start()
    life(300)  # until numpy's and torch's own lists of free blocks are full
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    life(1000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert (engine.used_pages, engine.free_slots, engine.busy) == (0, engine.max_seqs, False)
    assert grown < 200_000  # a fifth of what a thousand requests take
    assert answers(engine, [ids(70)], GREEDY) == expected


def test_at_the_context_limit_answers_end_with_length(make_long: Callable[..., Engine]) -> None:
    full = replace(GREEDY, max_tokens=10_000)
    for size in (WINDOW - 1, WINDOW - 2, WINDOW - PAGE):
        alone = make_long().generate([ids(size)], full)[0]
        assert (len(alone.token_ids), alone.finish_reason) == (WINDOW - size, "length")
    drafted = make_long(speculate=7).generate([[7, 8, 9] * 160], full)[0]
    assert (len(drafted.token_ids), drafted.finish_reason) == (WINDOW - 480, "length")


def test_one_request_may_fill_the_whole_pool(make_long: Callable[..., Engine]) -> None:
    page = 2 * 2 * 2 * 8 * PAGE * 4
    engine = make_long(kv_memory=5 * page)
    assert engine.max_seq_len == 4 * PAGE
    got = answers(engine, [ids(20, n) for n in range(3)], replace(GREEDY, max_tokens=500))
    assert [len(c.token_ids) for c in got] == [4 * PAGE - 20] * 3
    roomy = make_long(max_seq_len=128)
    plain = answers(roomy, [ids(20, n) for n in range(3)], replace(GREEDY, max_tokens=500))
    assert got == plain
