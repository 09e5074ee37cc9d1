"""Many items asked at once. Enters: items; leaves: each with its `Answer`, in the order they come.

An item is asked until its answer passes the checks; a busy endpoint is waited for, a lost one stops the run.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Self

from microlm.core import runtime
from microlm.core.client import ChatReply, EndpointError
from microlm.core.errors import UserError
from microlm.core.records import Constraint, Sampling
from microlm.text.read import Fault
from microlm.text.synth.check import check_reply
from microlm.text.synth.endpoint import BulkClient, Limiter, Passing, backoff_s
from microlm.text.synth.items import Item
from microlm.text.synth.journal import Answer
from microlm.text.synth.prompts import taught
from microlm.text.synth.recipe import Endpoint, SynthRecipe, Template

REFUSED = "refused_"  # heads the reason of an item that the endpoint would not take
_ITEMS_OWN = (200, 400, 413, 422)  # about this request, not about all of them; 200: not a reply
_AGAIN = "the answers so far are kept, run the same command again to continue"
_CHARS_PER_TOKEN = 3


class Asker:
    """Asks one item to the end. Used by several threads at once."""

    def __init__(self, recipe: SynthRecipe, endpoint: Endpoint, client: BulkClient, model: str) -> None:
        self.limiter = Limiter(endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._recipe, self._endpoint, self._client, self._model = recipe, endpoint, client, model

    def ask(self, item: Item) -> Answer:
        """An answer, or the reason of the last attempt; raises UserError when no item can be asked."""
        faults: list[str] = []
        for attempt in range(self._recipe.draw.attempts):
            sampling = self._sampling(item, attempt)
            seed = sampling.seed or 0
            try:
                reply = self._reply(item, sampling)
            except Refused as e:
                return Answer(
                    reason=e.reason, detail=str(e), asked_model=self._model, seed=seed, faults=faults
                )
            text, fault = self._checked(reply, item.template)
            if fault is not None:
                faults.append(fault.reason)
            if fault is None or attempt + 1 == self._recipe.draw.attempts:
                break
        return Answer(
            text=text,
            reason=fault.reason if fault else "",
            detail=fault.detail if fault else "",
            model=reply.model,
            asked_model=self._model,
            seed=seed,
            finish_reason=reply.finish_reason,
            usage=asdict(reply.usage) if reply.usage else None,
            faults=faults[:-1] if fault else faults,
        )

    def _checked(self, reply: ChatReply, template: Template) -> tuple[str, Fault | None]:
        asks = self._recipe.prompts
        try:
            if asks is not None:
                return taught(reply, asks.thinking), None
            return check_reply(reply, template.json_schema)[0], None
        except Fault as fault:
            return reply.text.encode("utf-8", "replace").decode(), fault

    def _sampling(self, item: Item, attempt: int) -> Sampling:
        draw, schema = self._recipe.draw, item.template.json_schema
        sent = schema is not None and item.template.constrain
        return Sampling(
            max_tokens=draw.max_tokens,
            temperature=draw.temperature,
            top_p=draw.top_p,
            top_k=draw.top_k,
            # 31 bits: some endpoints take no more
            seed=runtime.derive_seed(self._recipe.seed, "answer", item.id, attempt) % (1 << 31),
            stop=draw.stop,
            constraint=Constraint("json_schema", json.dumps(schema, ensure_ascii=False)) if sent else None,
        )

    def _reply(self, item: Item, sampling: Sampling) -> ChatReply:
        size = sum(len(m.content) for m in item.messages)
        estimate = size // _CHARS_PER_TOKEN + sampling.max_tokens
        for retry in range(self._endpoint.retries + 1):
            self.limiter.acquire(estimate)
            used = 0
            try:
                tools = {"tools": [json.loads(tool) for tool in item.tools]} if item.tools else {}
                reply = self._client.chat(item.messages, sampling, self._model, **tools)
                used = reply.usage.total_tokens if reply.usage else estimate
                return reply
            except EndpointError as e:
                if e.status in _ITEMS_OWN:
                    raise Refused(e.status, str(e)) from None
                raise UserError(f"{e}; {_AGAIN}") from None
            except Passing as e:
                if retry == self._endpoint.retries:
                    if e.status == 500:
                        raise Refused(500, str(e)) from None
                    raise UserError(f"{e}; after {retry} repetitions; {_AGAIN}") from None
                waiting, wait_s = retry, e.wait_s
            finally:
                self.limiter.settle(estimate, used)
            if wait_s is None:
                self.limiter.sleep(backoff_s(waiting))
            else:
                self.limiter.pause(wait_s)  # it spoke to all of us
        raise AssertionError("the last repetition returns or raises")


class Refused(Exception):
    """The endpoint will not answer this one request."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = f"{REFUSED}{status}"


class Bulk:
    """Threads that ask. They are daemons: a second Ctrl-C does not wait for an endpoint.

    `ask` runs in them, and keeps what it is told itself: no signal ever interrupts a thread.
    """

    def __init__(self, ask: Callable[[Item], Answer], limiter: Limiter, workers: int) -> None:
        self._ask, self._limiter = ask, limiter
        self._inbox: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[Item, Answer | Exception]] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Start nothing new and wait for what is under way: it is paid for."""
        self._limiter.stop()
        for _ in self._threads:
            self._inbox.put(None)
        for thread in self._threads:
            thread.join()

    def answers(self, items: Iterable[Item]) -> Iterator[tuple[Item, Answer]]:
        """Ask all of them, few of them waiting; raises what a thread raised."""
        rest, pending = iter(items), 0
        while True:
            while pending < 2 * len(self._threads) and (item := next(rest, None)) is not None:
                self._inbox.put(item)
                pending += 1
            if not pending:
                return
            item, answer = self._outbox.get()
            pending -= 1
            if isinstance(answer, Exception):
                raise answer
            yield item, answer

    def _work(self) -> None:
        while (item := self._inbox.get()) is not None:
            try:
                self._outbox.put((item, self._ask(item)))
            except Exception as e:  # raised again by the thread that collects
                self._outbox.put((item, e))
