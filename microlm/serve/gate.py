"""What stands before the routes: Host check, key, body limit, request log. Enters and leaves: ASGI messages.

The log line holds method, route, status and time; never a body, a header, a query or an unknown path.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from microlm.core.endpoint import is_loopback
from microlm.serve.errors import ApiError

LOG = logging.getLogger("microlm.serve")
OPEN_ROUTES = ("/health",)


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


@dataclass(frozen=True)
class Limits:
    """What the door lets in. `loopback_hosts_only` refuses any other Host header (DNS rebinding)."""

    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 30.0
    max_queue: int = 64
    max_choices: int = 32
    loopback_hosts_only: bool = True


class Gate:
    """Outermost ASGI layer; a refusal is answered here and never reaches a route."""

    def __init__(self, app: ASGIApp, api_key: str | None, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self._key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        reply = _Reply(send)
        try:
            self._check(scope)
            await self.app(scope, await self._read(scope, receive), reply)
        except ApiError as e:
            await reply.refuse(e, scope, receive)
        except ClientGone:
            pass  # nobody is there to answer
        except Exception as e:  # a bug: the client gets a plain 500, the log the place without the values
            LOG.error("%s\n%s", type(e).__name__, "".join(traceback.format_tb(e.__traceback__)))
            await reply.refuse(
                ApiError(500, "internal error; the server's log names the place"), scope, receive
            )
        finally:
            route = getattr(scope.get("route"), "path", "-")
            milliseconds = (time.perf_counter() - started) * 1000
            LOG.info("%s %s %s %.0f ms", scope["method"][:8], route, reply.status or "gone", milliseconds)

    def _check(self, scope: Scope) -> None:
        headers = _headers(scope)
        if self.limits.loopback_hosts_only and not is_loopback(_host(headers.get("host", ""))):
            raise ApiError(
                403, "this server answers only to loopback names in the Host header", "host_not_allowed"
            )
        if self._key is None or scope["path"] in OPEN_ROUTES:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            message = "the API key is missing or wrong; send 'Authorization: Bearer KEY'"
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, within the limits of bytes and time, and a `receive` that gives it again."""
        declared = _headers(scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self.limits.max_body_bytes:
            raise self._too_large()
        body = b""
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > self.limits.max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(
                408, "the body came too slowly", "timeout", headers={"Connection": "close"}
            ) from None
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self.limits.max_body_bytes} bytes"
        return ApiError(413, message, "request_too_large", headers={"Connection": "close"})


class _Reply:
    """A `send` that remembers the status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def refuse(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Answer with an error, unless an answer has begun."""
        if self.status is None:
            await error.response(scope, receive, self)


def _headers(scope: Scope) -> Mapping[str, Any]:
    return {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}


def _host(header: str) -> str:
    """The Host header without its port: `[::1]:8000` → `::1`."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
