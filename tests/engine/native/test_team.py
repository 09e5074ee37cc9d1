"""Threads of a compiled call: what one of them raises reaches the caller, and nobody waits for ever."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path

import pytest
from random_model import write_model

from microlm.core.records import Sampling
from microlm.engine import Engine
from microlm.engine.native.team import Team


@pytest.mark.timeout(20)
def test_a_fault_of_a_helper_is_raised_and_the_next_call_works() -> None:
    team = Team(3)
    seen: set[int] = set()
    met = threading.Barrier(3)

    def fail(thread: int, calls: int, sync: int) -> None:
        if thread:
            raise MemoryError("no room")

    def work(thread: int, calls: int, sync: int) -> None:
        seen.add(thread)
        met.wait(10)

    for _ in range(3):
        with pytest.raises(MemoryError, match="no room"):
            for _ in range(100):  # thread 0 may be done before a helper has begun
                team.run(fail)
                threading.Event().wait(0.01)
    team.run(work)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_dropped_engine_leaves_neither_weights_nor_threads(tmp_path: Path, threads: int) -> None:
    before = threading.active_count()
    engine = Engine(write_model(tmp_path / "model", "qwen3"), threads=threads)
    engine.generate([[20, 21, 22]], Sampling(max_tokens=5))
    assert threading.active_count() >= before + threads - 1
    weights = weakref.ref(engine._decoder.lm_head.weight)
    del engine
    end = time.monotonic() + 10  # a helper may be at the end of its part still
    while weights() is not None or threading.active_count() > before:
        assert time.monotonic() < end
        gc.collect()
        time.sleep(0.01)
