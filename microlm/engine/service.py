"""The engine on a thread of its own, for asyncio. Enters: prompts; leaves: streams of Deltas."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from microlm.core.records import FinishReason, Sampling
from microlm.engine.engine import Engine
from microlm.engine.prompts import Prompt
from microlm.engine.request import Delta, Request


class Busy(Exception):
    """The queue is full (HTTP 503): try again later."""


@dataclass(eq=False)
class _Mailbox:
    """Where the engine's thread leaves a request's deltas: a queue that belongs to the consumer's loop."""

    loop: asyncio.AbstractEventLoop
    deltas: asyncio.Queue[Delta] = field(default_factory=asyncio.Queue)


class DeltaStream(AsyncIterator[Delta]):
    """One request's deltas. Closing it, losing it, or cancelling who waits for it frees the slot."""

    def __init__(self, deltas: asyncio.Queue[Delta], cancel: Callable[[], None], prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._deltas = deltas
        self._cancel = cancel
        self._finished = False

    async def __anext__(self) -> Delta:
        if self._finished:
            raise StopAsyncIteration
        try:
            delta = await self._deltas.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._finished = delta.finish_reason is not None
        return delta

    async def aclose(self) -> None:
        """Stop listening; an unfinished request is cancelled."""
        if not self._finished:
            self._finished = True
            self._cancel()

    def __del__(self) -> None:
        if not self._finished:
            self._cancel()


class EngineService:
    """Runs `engine.step()` in a background thread while there is work; nobody else may step the engine."""

    def __init__(self, engine: Engine, max_queue: int = 256) -> None:
        self.engine = engine
        self.max_queue = max_queue
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._boxes: dict[Request, _Mailbox] = {}
        self._open = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="microlm-engine", daemon=True)
        self._thread.start()

    @property
    def open_requests(self) -> int:
        """Requests that wait or run."""
        return self._open

    async def submit(self, prompt: Prompt, sampling: Sampling) -> DeltaStream:
        """Queue a request; raises Busy when slots and queue are full, UserError when it can never run.

        Usage: `async for delta in await service.submit(prompt, sampling)`.
        """
        self._reserve()
        try:
            request = await asyncio.to_thread(self.engine.prepare, prompt, sampling)
            box = _Mailbox(asyncio.get_running_loop())
            self._post(lambda: self._admit(request, box))
        except BaseException:
            self._free()
            raise
        return DeltaStream(box.deltas, lambda: self._post_drop(request), len(request.prompt))

    def close(self) -> None:
        """Stop the thread; open requests end as cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _reserve(self) -> None:
        with self._wake:
            if self._closed or self._open >= self.engine.max_seqs + self.max_queue:
                raise Busy(f"{self._open} requests are open already; try again in a moment")
            self._open += 1

    def _free(self) -> None:
        with self._wake:
            self._open -= 1

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._closed:
                raise Busy("the server is shutting down; ask another")
            self._inbox.append(command)
            self._wake.notify()

    def _post_drop(self, request: Request) -> None:
        with self._wake:
            self._inbox.append(lambda: self._drop(request))
            self._wake.notify()

    def _admit(self, request: Request, box: _Mailbox) -> None:
        self._boxes[request] = box
        self.engine.enqueue(request)

    def _drop(self, request: Request) -> None:
        if self._boxes.pop(request, None) is not None:
            self.engine.cancel(request)
            self._free()

    def _run(self) -> None:
        while self._run_commands():
            try:
                self._deliver(self.engine.step())
            except Exception as e:  # one bad step must not end the service: everyone in it is told
                self._end_all("error", f"the engine failed: {type(e).__name__}: {e}")
        self._end_all("cancelled", "the server is shutting down")

    def _run_commands(self) -> bool:
        """Wait for work and run what was posted; False when the service is closed."""
        with self._wake:
            while not (self._inbox or self._closed or self.engine.busy):
                self._wake.wait()
            commands, self._inbox = self._inbox, deque()
            closed = self._closed
        for command in commands:
            command()
        return not closed

    def _deliver(self, deltas: Iterable[tuple[Request, Delta]]) -> None:
        """Hand a step's deltas over: one wake-up per event loop, however many requests moved."""
        mail: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Delta]]] = {}
        for request, delta in deltas:
            box = self._boxes[request]
            mail.setdefault(box.loop, []).append((box, delta))
            if delta.finish_reason:
                del self._boxes[request]
                self._free()
        for loop, letters in mail.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, letters)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        requests = list(self._boxes)
        for request in requests:
            self.engine.cancel(request)
        self._deliver([(r, Delta("", (), reason, error)) for r in requests])


def _put_all(letters: list[tuple[_Mailbox, Delta]]) -> None:
    for box, delta in letters:
        box.deltas.put_nowait(delta)
