"""The engine on a thread of its own, for asyncio. Enters: prompts; leaves: streams of Deltas.

Whatever happens to the engine, every open request ends: with its answer, or with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from microlm.core.records import FinishReason, Sampling
from microlm.engine.engine import Engine
from microlm.engine.prompts import Prompt
from microlm.engine.request import Delta, Request

LOG = logging.getLogger("microlm.engine")
SHUTTING_DOWN = "the server is shutting down"


class Busy(Exception):
    """The queue is full (HTTP 429): try again later."""


class Stopped(Exception):
    """The service was closed, or its engine failed (HTTP 503): it takes no request any more."""


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
        self._inbox: deque[tuple[Request, _Mailbox | None]] = deque()  # who comes; without a box: who leaves
        self._boxes: dict[Request, _Mailbox] = {}
        self._open = 0
        self._closed = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="microlm-engine", daemon=True)
        self._thread.start()

    @property
    def open_requests(self) -> int:
        """Requests that wait or run."""
        return self._open

    @property
    def failure(self) -> str | None:
        """Why the engine answers nobody any more; None while it works."""
        return self._failure

    async def submit(self, prompt: Prompt, sampling: Sampling, adapter: str | None = None) -> DeltaStream:
        """Queue a request for one answer; raises Busy when slots and queue are full, UserError when it can
        never run, Stopped when nothing runs any more.

        Usage: `async for delta in await service.submit(prompt, sampling)`.
        """
        (stream,) = await self._submit(1, lambda: [self.engine.prepare(prompt, sampling, adapter=adapter)])
        return stream

    async def submit_many(
        self, prompt: Prompt, sampling: Sampling, adapter: str | None = None
    ) -> list[DeltaStream]:
        """Queue `sampling.n` requests that share the prompt's pages, all or none; raises as `submit`."""
        return await self._submit(
            max(sampling.n, 1), lambda: self.engine.prepare_many(prompt, sampling, adapter=adapter)
        )

    async def _submit(self, count: int, prepare: Callable[[], list[Request]]) -> list[DeltaStream]:
        self._reserve(count)
        try:
            requests = await asyncio.to_thread(prepare)
            loop = asyncio.get_running_loop()
            boxes = [_Mailbox(loop) for _ in requests]
            self._post(zip(requests, boxes, strict=True))
        except BaseException:
            self._free(count)
            raise
        return [
            DeltaStream(box.deltas, partial(self._post_drop, request), len(request.prompt))
            for request, box in zip(requests, boxes, strict=True)
        ]

    def close(self) -> None:
        """Stop the thread; open requests end as cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _reserve(self, count: int) -> None:
        with self._wake:
            self._require_open()
            if self._open + count > self.engine.max_seqs + self.max_queue:
                raise Busy(f"{self._open} requests are open already; try again in a moment")
            self._open += count

    def _free(self, count: int = 1) -> None:
        with self._wake:
            self._open -= count

    def _require_open(self) -> None:
        if self._closed:
            raise Stopped(self._failure or f"{SHUTTING_DOWN}; ask another")

    def _post(self, letters: Iterable[tuple[Request, _Mailbox]]) -> None:
        with self._wake:
            self._require_open()
            self._inbox.extend(letters)
            self._wake.notify()

    def _post_drop(self, request: Request) -> None:
        with self._wake:
            self._inbox.append((request, None))
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._read_inbox():
                self._step()
            self._end_all("cancelled", SHUTTING_DOWN)
        except Exception as e:
            self._fail(e)

    def _read_inbox(self) -> bool:
        """Wait for work and let in and out who asked for it; False when the service is closed."""
        with self._wake:
            while not (self._inbox or self._closed or self.engine.busy):
                self._wake.wait()
            closed = self._closed
        while self._inbox:
            request, box = self._inbox.popleft()
            if box is not None:
                self._boxes[request] = box
                self.engine.enqueue(request)
            elif self._boxes.pop(request, None) is not None:
                self.engine.cancel(request)
                self._free()
        return not closed

    def _step(self) -> None:
        """One step. One that fails is told to all in it; later ones are served if the engine still works."""
        try:
            self._deliver(self.engine.step())
        except Exception as e:
            _log(e)
            # Its words may hold a prompt, and everyone in the step is told: the type is enough.
            self._end_all("error", f"the engine failed ({type(e).__name__})")
            self.engine.generate([[0]], Sampling(max_tokens=1))
            if self.engine.busy:
                raise RuntimeError("requests of a failed step still hold slots") from None

    def _fail(self, e: Exception) -> None:
        """The engine does not work any more: close, and tell everyone without touching it again."""
        _log(e)
        with self._wake:
            self._failure = f"the engine failed ({type(e).__name__}); restart the server"
            self._closed = True
            self._boxes |= {request: box for request, box in self._inbox if box is not None}
        self._tell_all("error", self._failure)

    def _deliver(self, deltas: Iterable[tuple[Request, Delta]]) -> None:
        """Hand a step's deltas over: one wake-up per event loop, however many requests moved."""
        mail: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Delta]]] = {}
        for request, delta in deltas:
            box = self._boxes.get(request)
            if box is None:  # nobody listens any more
                continue
            mail.setdefault(box.loop, []).append((box, delta))
            if delta.finish_reason:
                del self._boxes[request]
                self._free()
        for loop, letters in mail.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(_put_all, letters)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        for request in self._boxes:
            self.engine.cancel(request)
        self._tell_all(reason, error)

    def _tell_all(self, reason: FinishReason, error: str) -> None:
        self._deliver([(r, Delta("", (), reason, error)) for r in self._boxes])


def _log(e: Exception) -> None:
    """The place without the values, which may be a prompt's."""
    LOG.error("%s\n%s", type(e).__name__, "".join(traceback.format_tb(e.__traceback__)))


def _put_all(letters: list[tuple[_Mailbox, Delta]]) -> None:
    for box, delta in letters:
        box.deltas.put_nowait(delta)
