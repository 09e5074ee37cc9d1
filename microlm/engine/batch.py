"""Many questions, asked without an end in sight: the engine's slots stay full, answers come as they finish.

Enters: an iterator that is read as there is room; leaves: completions, by finishing or in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from microlm.core.errors import UserError
from microlm.core.records import Completion, Sampling
from microlm.engine.engine import Engine
from microlm.engine.prompts import Prompt
from microlm.engine.request import Request


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt, how to answer it, and with which of the loaded adapters."""

    prompt: Prompt
    sampling: Sampling
    adapter: str | None = None


def finished(
    engine: Engine, asks: Iterable[Ask], between: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, list[Completion]]]:
    """(number of the ask, its `n` completions) as each is finished. Closing it cancels what runs.

    As many requests as there are slots wait beside those that run. An ask that cannot run (too long, a wrong
    setting) is answered at once by one completion with finish_reason `error`. `between` is called when the
    answers of a step are handed over, and may raise.
    """
    coming = enumerate(asks)
    running: dict[int, list[Request]] = {}
    try:
        while True:
            while sum(map(len, running.values())) < 2 * engine.max_seqs and (item := next(coming, None)):
                number, ask = item
                try:
                    requests = _prepare(engine, ask)
                except UserError as e:
                    yield number, [Completion("", (), "error", 0, str(e))]
                    continue
                running[number] = [engine.enqueue(request) for request in requests]
            if not running:
                return
            engine.step()
            for number in [i for i, own in running.items() if all(r.finish_reason for r in own)]:
                yield number, [engine.completion(request) for request in running.pop(number)]
            between()
    finally:
        for requests in running.values():
            for request in requests:
                engine.cancel(request)


def in_order(engine: Engine, asks: Iterable[Ask]) -> Iterator[list[Completion]]:
    """The completions of every ask, in the order of the asks."""
    early: dict[int, list[Completion]] = {}
    given = 0
    for number, completions in finished(engine, asks):
        early[number] = completions
        while given in early:
            yield early.pop(given)
            given += 1


def _prepare(engine: Engine, ask: Ask) -> list[Request]:
    """The `n` requests of an ask; its text is followed only where a stop string is looked for."""
    live = bool(ask.sampling.stop)
    return engine.prepare_many(ask.prompt, ask.sampling, live=live, adapter=ask.adapter)
