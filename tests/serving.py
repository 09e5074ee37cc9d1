"""Real servers in threads: the real engine on a tiny random model behind uvicorn, or any application."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.engine import Engine
from microlm.serve import listen
from microlm.serve.gate import Limits
from microlm.serve.server import create_app


@dataclass
class Running:
    """A server that listens, the engine behind it, and uvicorn's server object."""

    url: str
    engine: Engine
    door: listen.Door


@contextmanager
def run_app(app: Any) -> Iterator[tuple[str, listen.Door]]:
    """Serve an ASGI application on a free port of the loopback."""
    listener = listen.bind("127.0.0.1", 0)
    ready = threading.Event()
    door = listen.make_door(app, ready.set)
    url = listen.address_of(listener)
    thread = threading.Thread(target=door.run, args=([listener],), daemon=True)
    thread.start()
    assert ready.wait(60)
    yield url, door
    door.should_exit = True
    thread.join(10)
    door.force_exit = True  # a client may still hold its connection
    thread.join(60)
    assert not thread.is_alive()


@contextmanager
def run_model(
    directory: Path, api_key: str | None = None, limits: Limits | None = None, max_seqs: int = 4
) -> Iterator[Running]:
    """Serve a model directory as `tiny`."""
    engine = Engine(directory, max_seqs=max_seqs)
    with run_app(create_app(engine, "tiny", api_key, limits)) as (url, door):
        yield Running(url, engine, door)
