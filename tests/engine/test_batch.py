"""Asked in a stream = asked at once; the slots stay full, asks are read as there is room, nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from microlm.core.records import Sampling
from microlm.engine import Engine
from microlm.engine.batch import Ask, finished, in_order

SAMPLING = Sampling(max_tokens=5, temperature=1.0, ignore_eos=True)


def asks(count: int, read: list[int] | None = None) -> Iterator[Ask]:
    """Asks of different lengths; `read` hears which were taken."""
    for i in range(count):
        if read is not None:
            read.append(i)
        yield Ask(f"hello {i}", replace(SAMPLING, max_tokens=3 + 5 * (i % 7), seed=i))


def test_in_order_equals_generate(make_engine: Callable[..., Engine]) -> None:
    all_asks = list(asks(30))
    expected = make_engine().generate([a.prompt for a in all_asks], [a.sampling for a in all_asks])
    for slots in (1, 3, 64):
        answers = list(in_order(make_engine(max_seqs=slots, prefix_caching=False), iter(all_asks)))
        assert [(c.text, c.token_ids) for (c,) in answers] == [(c.text, c.token_ids) for c in expected]


def test_slots_stay_full_and_asks_are_read_as_there_is_room(make_engine: Callable[..., Engine]) -> None:
    engine, read, running = make_engine(max_seqs=3), [], []
    engine.on_step = lambda work: running.append(len({w.request for w in work}))
    done = 0
    for _ in finished(engine, asks(40, read)):
        done += 1
        assert len(read) <= done + 2 * engine.max_seqs
    assert done == 40 and running[: len(running) * 3 // 4] == [3] * (len(running) * 3 // 4)


def test_whoever_is_finished_first_comes_first(make_engine: Callable[..., Engine]) -> None:
    lengths = (30, 2, 2, 2)
    long_first = [Ask("a", replace(SAMPLING, max_tokens=n, seed=1)) for n in lengths]
    numbers = [number for number, _ in finished(make_engine(max_seqs=2), long_first)]
    assert numbers == [1, 2, 3, 0]


def test_several_answers_come_together(engine: Engine) -> None:
    many = replace(SAMPLING, n=3, seed=5)
    (first, second), (alone,) = in_order(engine, [Ask("a", replace(many, n=2)), Ask("a", replace(many, n=1))])
    assert (first.index, second.index) == (0, 1) and first.token_ids == alone.token_ids != second.token_ids
    assert [len(c) for c in in_order(engine, [Ask("a", many)] * 9)] == [3] * 9


def test_an_ask_that_cannot_run_is_an_answer(engine: Engine) -> None:
    wrong = [Ask("a" * 999, SAMPLING), Ask("a", replace(SAMPLING, top_p=2.0)), Ask("a", SAMPLING, "nobody")]
    found = [c for (c,) in in_order(engine, [Ask("a", SAMPLING), *wrong, Ask("b", SAMPLING)])]
    assert [c.finish_reason for c in found] == ["length", "error", "error", "error", "length"]
    assert ["window" in found[1].error, "top_p" in found[2].error, "nobody" in found[3].error] == [True] * 3


def test_who_stops_listening_leaves_nothing_behind(engine: Engine) -> None:
    stream = finished(engine, asks(100))
    next(stream)
    assert engine.busy
    stream.close()
    assert not engine.busy and engine.free_slots == engine.max_seqs

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(finished(engine, asks(100), interrupt))
    assert not engine.busy and engine.used_pages == 0
