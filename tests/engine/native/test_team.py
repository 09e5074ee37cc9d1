"""Threads of a compiled call: what one of them raises reaches the caller, and nobody waits for ever."""

from __future__ import annotations

import threading

import pytest

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
