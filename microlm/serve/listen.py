"""From an application to an open port. Enter: app, host, port; leaves: a served address.

Closed by default: loopback, and no public address without a key. The key never comes from the command line.
"""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from microlm.core.endpoint import KEY_VARIABLE, is_loopback
from microlm.core.errors import UserError

MIN_KEY_CHARS = 8
DRAIN_S = 30  # how long requests may take to end after SIGTERM


def check_exposure(host: str, api_key: str | None) -> None:
    """Refuse an address that others can reach without a key, and a key that is quickly guessed."""
    if not is_loopback(host) and api_key is None:
        raise UserError(
            f"--host {host or '(all)'}: other machines can reach this address, so a key is needed; "
            f"give --api-key-file FILE or set {KEY_VARIABLE}, or keep the default 127.0.0.1"
        )
    if api_key is not None and len(api_key) < MIN_KEY_CHARS:
        raise UserError(f"API key: is shorter than {MIN_KEY_CHARS} characters; make a longer one")


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 lets the system choose. What is wrong is said before any model is loaded."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: is no port; choose a number from 0 to 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host}: no such address on this machine; try 127.0.0.1") from None
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1)  # takes the port at once; uvicorn sets the real backlog
    except OSError as e:
        listener.close()
        if e.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port {port}: is in use; choose another one, or --port 0 for a free one"
            ) from None
        raise UserError(f"--host {host} --port {port}: cannot listen there ({e.strerror})") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Door(uvicorn.Server):
    """Says when it listens, and leaves the exit code to us instead of raising the signal again."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready
        self.interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call `ready`."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM and Ctrl-C drain; a second Ctrl-C does not wait."""
        self.interrupted |= sig == signal.SIGINT
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def make_door(app: FastAPI, ready: Callable[[], None]) -> Door:
    """A server for `app`: `door.run([listener])` serves until SIGTERM or Ctrl-C and drains."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="warning",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=512,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=DRAIN_S,
    )
    return Door(config, ready)
