"""The one OpenAI-protocol client, synchronous. Enters: messages or a prompt and `Sampling`.

Leaves: replies, or deltas with the time each was received. It retries nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from microlm.core import payload
from microlm.core.endpoint import is_loopback, root_url
from microlm.core.errors import UserError
from microlm.core.records import Message, Sampling

DONE = "[DONE]"


class EndpointError(UserError):
    """The endpoint answered with an error: its HTTP `status`, and the `body` it sent (None: not JSON)."""

    def __init__(self, sentence: str, status: int, body: Any = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.body = body


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as the endpoint reports them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A whole answer. `usage` is None when the endpoint reports none; `raw` is the JSON object it sent."""

    text: str
    finish_reason: str | None
    usage: Usage | None
    id: str = ""
    model: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """One event of a stream; `received_s` is `time.perf_counter()` when its last byte was read."""

    text: str
    finish_reason: str | None
    usage: Usage | None
    received_s: float
    raw: Mapping[str, Any] = field(default_factory=dict)


class Client:
    """An OpenAI-compatible endpoint. `base_url` with or without `/v1`; a context manager.

    `timeout_s` bounds the silence while connecting and between bytes: a stream may last as long as it moves,
    unless `deadline_s` bounds the whole exchange, seen whenever bytes of the answer's body come.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        deadline_s: float | None = None,
    ) -> None:
        self.url = root_url(base_url)
        self.timeout_s = timeout_s
        self.deadline_s = deadline_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        proxies = not is_loopback(urlsplit(self.url).hostname or "")  # a proxy cannot reach our loopback
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=proxies)
        self._model: str | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def health(self) -> bool:
        """Whether `GET /health` answers 200; a server that cannot be reached is an error."""
        return self.request("GET", "/health").status_code == 200

    def models(self) -> list[str]:
        """The ids of the served models."""
        data = self.call("GET", "/v1/models").get("data")
        if not isinstance(data, list) or not all(
            isinstance(m, dict) and isinstance(m.get("id"), str) for m in data
        ):
            raise EndpointError(
                f"{self.url}/v1/models: no list of models with ids; is this OpenAI-compatible?", 200
            )
        return [m["id"] for m in data]

    def default_model(self) -> str:
        """The first served model, asked for once."""
        if self._model is None:
            names = self.models()
            if not names:
                raise EndpointError(f"{self.url}/v1/models: the list is empty; load a model first", 200)
            self._model = names[0]
        return self._model

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        model: str | None = None,
        **extra: Any,
    ) -> ChatReply:
        """The answer to a conversation. `extra` are more fields of the request body."""
        body = self.chat_body(messages, sampling or Sampling(), model) | extra
        return self._reply("/v1/chat/completions", self.call("POST", "/v1/chat/completions", body))

    def chat_stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        model: str | None = None,
        **extra: Any,
    ) -> Iterator[ChatDelta]:
        """The answer piece by piece, usage last; closing the iterator closes the connection."""
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        body = self.chat_body(messages, sampling or Sampling(), model) | streaming | extra
        for event in self.events("/v1/chat/completions", body):
            if event.data == DONE:
                return
            yield self._delta("/v1/chat/completions", event)

    def complete(
        self, prompt: str, sampling: Sampling | None = None, model: str | None = None, **extra: Any
    ) -> ChatReply:
        """The continuation of raw text (`/v1/completions`)."""
        body = {
            "model": model or self.default_model(),
            "prompt": prompt,
            **payload.wire(sampling or Sampling()),
            **extra,
        }
        return self._reply("/v1/completions", self.call("POST", "/v1/completions", body))

    def chat_body(
        self, messages: Sequence[Message], sampling: Sampling, model: str | None = None
    ) -> dict[str, Any]:
        """The request body of a chat."""
        turns = payload.chat_turns(messages)
        return {"model": model or self.default_model(), "messages": turns, **payload.wire(sampling)}

    def request(self, method: str, path: str, content: bytes | None = None) -> httpx.Response:
        """One exchange, whatever its status; only an unreachable or silent endpoint is an error."""
        with self._exchange(method, path, content) as response:
            response.read()
        return response

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One exchange of JSON objects; an error status or another content is an `EndpointError`."""
        content = None if body is None else _encode(body)
        response = self.request(method, path, content)
        data = _json(response.content)
        if response.status_code >= 400:
            raise self._error(path, response.status_code, data)
        if not isinstance(data, dict):
            sentence = (
                f"{self.url}{path}: the answer is not a JSON object; is this an OpenAI-compatible server?"
            )
            raise EndpointError(sentence, response.status_code)
        return data

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[payload.Event]:
        """The server-sent events of a streaming request, `[DONE]` included, until the server ends."""
        with self._exchange("POST", path, _encode(body)) as response:
            if response.status_code >= 400:
                raise self._error(path, response.status_code, _json(response.read()))
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                sentence = f"{self.url}{path}: asked for a stream, got '{kind}'; does this server stream?"
                raise EndpointError(sentence, response.status_code)
            yield from payload.split_events(response.iter_bytes())

    @contextmanager
    def _exchange(self, method: str, path: str, content: bytes | None) -> Iterator[httpx.Response]:
        """A response whose body is still to be read, within the deadline."""
        headers = {"Content-Type": "application/json"} if content is not None else {}
        started = time.perf_counter()
        with (
            self._explained(path),
            self._http.stream(method, path, content=content, headers=headers) as response,
        ):
            if self.deadline_s is not None:
                sentence = f"{self.url}{path}: the answer did not end within {self.deadline_s:g} s"
                assert isinstance(response.stream, httpx.SyncByteStream)
                response.stream = _Timed(response.stream, started + self.deadline_s, sentence)
            yield response

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise UserError(
                f"{self.url}{path}: nothing came for {self.timeout_s:g} s; is the server busy?"
            ) from None
        except httpx.ConnectError as e:
            raise UserError(
                f"{self.url}: cannot connect ({e}); is 'microlm serve DIR' running, the address right?"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise UserError(f"{self.url}{path}: the connection failed ({type(e).__name__}: {e})") from None

    def _error(self, path: str, status: int, data: Any) -> EndpointError:
        error = data.get("error") if isinstance(data, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        hint = "; give the key with --api-key-file or MICROLM_API_KEY" if status == 401 else ""
        return EndpointError(
            f"{self.url}{path}: HTTP {status}: {message or 'no error message'}{hint}", status, data
        )

    def _reply(self, path: str, data: dict[str, Any]) -> ChatReply:
        with self._well_formed(path, data):
            choice = next(iter(payload.choices(data)), None)
            if choice is None:
                raise payload.Malformed("'choices' is empty")
            holder, name = (
                (choice, "text") if "text" in choice else (payload.member(choice, "message"), "content")
            )
            if name not in holder:
                raise payload.Malformed("the first choice has no text")
            return ChatReply(
                text=payload.text(holder, name) or "",
                finish_reason=payload.text(choice, "finish_reason"),
                usage=_usage(data),
                id=payload.text(data, "id") or "",
                model=payload.text(data, "model") or "",
                raw=data,
            )

    def _delta(self, path: str, event: payload.Event) -> ChatDelta:
        data = _json(event.data.encode("utf-8", "surrogatepass"))
        with self._well_formed(path, data):
            if not isinstance(data, dict):
                raise payload.Malformed(f"an event of the stream is not a JSON object: {event.data[:80]!r}")
            if data.get("error") is not None:
                raise self._error(path, 200, data)
            choice = next(iter(payload.choices(data)), {})
            delta = payload.member(choice, "delta")
            payload.text(delta, "role")
            return ChatDelta(
                text=payload.text(delta, "content") or "",
                finish_reason=payload.text(choice, "finish_reason"),
                usage=_usage(data),
                received_s=event.received_s,
                raw=data,
            )

    @contextmanager
    def _well_formed(self, path: str, data: Any) -> Iterator[None]:
        try:
            yield
        except payload.Malformed as e:
            raise EndpointError(f"{self.url}{path}: {e}; is this OpenAI-compatible?", 200, data) from None


class _Timed(httpx.SyncByteStream):
    """A body's raw bytes until a deadline; before decoding, for what decodes to nothing takes time too."""

    def __init__(self, inner: httpx.SyncByteStream, deadline: float, sentence: str) -> None:
        self._inner = inner
        self._deadline = deadline
        self._sentence = sentence

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._inner:
            if time.perf_counter() > self._deadline:
                raise UserError(self._sentence)
            yield chunk

    def close(self) -> None:
        self._inner.close()


def _usage(data: dict[str, Any]) -> Usage | None:
    found = payload.counts(data)
    return Usage(*found) if found else None


def _encode(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("the request holds a lone surrogate, which is not text; take it out") from None


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
