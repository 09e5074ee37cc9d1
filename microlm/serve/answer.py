"""One request's way through the engine. Enter: prompts and sampling; leaves: a JSON answer or a stream.

A client that goes away cancels its generations, so that their slots are free for others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from microlm.core.errors import UserError
from microlm.core.records import Sampling, TokenLogprob
from microlm.engine import Busy, Delta, EngineService, Stopped
from microlm.engine.service import DeltaStream
from microlm.serve import logprobs, shapes
from microlm.serve.errors import ApiError, busy, unavailable
from microlm.serve.gate import ClientGone

EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass(frozen=True)
class Job:
    """One choice: prompt ids and how to draw."""

    prompt: list[int]
    sampling: Sampling


@dataclass
class Choice:
    """What has come of one choice so far."""

    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: int = 0
    offset: int = 0
    finish_reason: str = "stop"
    error: str = ""


class Answer(Response):
    """The response to a generation request; the engine starts when the response is sent."""

    def __init__(
        self, service: EngineService, envelope: shapes.Envelope, jobs: Sequence[Job], stream: bool
    ) -> None:
        super().__init__()
        self._service = service
        self._envelope = envelope
        self._jobs = jobs
        self._stream = stream
        self._choices = [Choice() for _ in jobs]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: send the answer, or stop generating when the client goes away."""
        async with aclosing(self._deltas()) as deltas:
            work = (
                self._send_events(deltas, send)
                if self._stream
                else self._send_whole(deltas, scope, receive, send)
            )
            await _unless_gone(receive, work)

    async def _send_whole(
        self, deltas: AsyncIterator[tuple[int, Delta]], scope: Scope, receive: Receive, send: Send
    ) -> None:
        async for index, delta in deltas:
            self._choices[index].parts.append(delta.text)
            self._choices[index].logprobs += delta.logprobs
        done = [
            ("".join(c.parts), c.finish_reason, self._logprobs(i, c.logprobs), c.error)
            for i, c in enumerate(self._choices)
        ]
        await JSONResponse(self._envelope.whole(done, self._usage()))(scope, receive, send)

    async def _send_events(self, deltas: AsyncIterator[tuple[int, Delta]], send: Send) -> None:
        first = await anext(deltas, None)  # a refusal by the engine comes here, before the status is sent
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        if self._envelope.chat:
            for index in range(len(self._jobs)):
                await _write(send, shapes.event(self._envelope.opening(index)))
        try:
            if first is not None:
                await self._send_delta(send, *first)
            async for index, delta in deltas:
                await self._send_delta(send, index, delta)
            if self._envelope.include_usage:
                await _write(send, shapes.event(self._envelope.counts(self._usage())))
        except ApiError as e:
            await _write(send, shapes.event(e.body))
        await _write(send, shapes.DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_delta(self, send: Send, index: int, delta: Delta) -> None:
        if delta.text or delta.logprobs:
            known = self._logprobs(index, delta.logprobs)
            await _write(send, shapes.event(self._envelope.piece(index, delta.text, known)))
        if delta.finish_reason:
            await _write(send, shapes.event(self._envelope.closing(index, delta.finish_reason, delta.error)))

    def _logprobs(self, index: int, known: Sequence[TokenLogprob]) -> shapes.Logprobs:
        """The next log-probabilities of a choice, None where they are not asked for."""
        if self._jobs[index].sampling.logprobs is None:
            return None
        tokenizer, choice = self._service.engine.tokenizer, self._choices[index]
        if self._envelope.chat:
            return logprobs.of_chat(tokenizer, known)
        told = logprobs.of_completion(tokenizer, known, choice.offset)
        choice.offset += sum(map(len, told["tokens"]))
        return told

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """The deltas of all choices as they come; every choice is in the queue, or none."""
        arrived: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()
        streams = await self._submit()
        pumps = [asyncio.create_task(_pump(i, s, arrived)) for i, s in enumerate(streams)]
        try:
            running = len(pumps)
            while running:
                index, item = await arrived.get()
                if item is None:
                    running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield index, self._counted(index, item)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _submit(self) -> list[DeltaStream]:
        streams: list[DeltaStream] = []
        try:
            for job in self._jobs:
                streams.append(await self._service.submit(job.prompt, job.sampling))
        except Exception as e:
            for stream in streams:
                await stream.aclose()
            if isinstance(e, Busy):
                raise busy() from None
            if isinstance(e, Stopped):
                raise unavailable(str(e)) from None
            if isinstance(e, UserError):
                raise ApiError(400, str(e), "invalid_value") from None
            raise
        return streams

    def _counted(self, index: int, delta: Delta) -> Delta:
        choice = self._choices[index]
        choice.tokens += len(delta.token_ids)
        if delta.finish_reason == "error":
            raise ApiError(500, f"the generation failed: {delta.error}", "generation_failed")
        if delta.finish_reason == "cancelled":
            raise ApiError(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "5"})
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        choice.error = delta.error
        return delta

    def _usage(self) -> dict[str, int]:
        prompts = {
            id(job.prompt): len(job.prompt) for job in self._jobs
        }  # the choices of one prompt share its list
        return shapes.usage(sum(prompts.values()), sum(c.tokens for c in self._choices))


async def _pump(
    index: int, stream: DeltaStream, arrived: asyncio.Queue[tuple[int, Delta | Exception | None]]
) -> None:
    try:
        async for delta in stream:
            arrived.put_nowait((index, delta))
        arrived.put_nowait((index, None))
    except Exception as e:
        arrived.put_nowait((index, e))
    finally:
        await stream.aclose()


async def _write(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, but end it with `ClientGone` as soon as the client closes the connection."""
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
