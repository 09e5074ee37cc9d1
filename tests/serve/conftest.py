"""A real server: the real engine on a tiny random model, uvicorn in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from microlm.engine import Engine
from microlm.serve import listen
from microlm.serve.gate import Limits
from microlm.serve.server import create_app

KEY = "key-for-the-tests-8d1f"


@dataclass
class Running:
    """A server that listens, and the engine behind it."""

    url: str
    engine: Engine


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def start(model_dir: Path) -> Iterator[Start]:
    """Start servers in threads; all are stopped at the end."""
    running: list[tuple[listen.Door, threading.Thread]] = []

    def run(api_key: str | None = None, limits: Limits | None = None, max_seqs: int = 4) -> Running:
        engine = Engine(model_dir, max_seqs=max_seqs)
        listener = listen.bind("127.0.0.1", 0)
        ready = threading.Event()
        door = listen.make_door(create_app(engine, "tiny", api_key, limits), ready.set)
        url = listen.address_of(listener)
        thread = threading.Thread(target=door.run, args=([listener],), daemon=True)
        thread.start()
        assert ready.wait(20)
        running.append((door, thread))
        return Running(url, engine)

    yield run
    for door, _ in running:
        door.should_exit = True
    for _, thread in running:
        thread.join(20)


@pytest.fixture(scope="session")
def server(start: Start) -> Running:
    """A server without a key."""
    return start()
