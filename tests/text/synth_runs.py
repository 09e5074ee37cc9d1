"""Synthesis for the tests: recipes, and our real server with a counter and faults in front of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving import run_app

from microlm.core.artifact import Artifact
from microlm.core.recipe import build
from microlm.engine import Engine
from microlm.serve.server import create_app
from microlm.text.synth.stage import SynthRecipe, run

CHAT = "/v1/chat/completions"
PEOPLE = ["李白", "杜甫", "王维", "Ada", "Grace", "Alan", "Emmy", "苏轼"]
TEMPLATE = {"name": "who", "prompt": "Who was {{ name }}?"}
DRAW = {
    "max_tokens": 200,
    "temperature": 1.0,
    "stop": ["a", "e", "i", "o", "u"],
}  # the tiny model never ends by itself
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["poet", "physicist"]}, "alive": {"type": "boolean"}},
    "required": ["kind", "alive"],
    "additionalProperties": False,
}


def recipe(out: Path, **fields: Any) -> SynthRecipe:
    return build(SynthRecipe, {"out": str(out), "templates": [TEMPLATE], **fields}, "test")


def synth(out: Path, **fields: Any) -> Artifact:
    return run(recipe(out, **fields))


def seeds(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def payload(artifact: Artifact) -> dict[str, bytes]:
    """The bytes of every payload file."""
    names = [f["path"] for f in artifact.manifest["files"] if f["payload"]]
    return {name: (artifact.path / name).read_bytes() for name in names}


def command(**fields: Any) -> list[str]:
    """The stage in a process of its own."""
    words = [
        "import sys, json",
        "from microlm.core.recipe import build",
        "from microlm.text.synth.stage import SynthRecipe, run",
        "run(build(SynthRecipe, json.loads(sys.argv[1]), 'test'))",
    ]
    return [sys.executable, "-c", "; ".join(words), json.dumps({"templates": [TEMPLATE], **fields})]


@dataclass
class Watched:
    """A server: its address, the chats it answered, and what it says instead to the next ones."""

    url: str
    app: Any
    answered: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    faults: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    gone_after: int | None = None  # answers, after which it is busy for ever

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != CHAT:
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.asked.append(json.loads(body))
        if self.answered == self.gone_after:
            return await self._refuse(send, 503, {})
        if self.faults:
            return await self._refuse(send, *self.faults.pop(0))

        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return first.pop() if first else await receive()

        self.answered += 1  # before the answer: who has it may be back at once
        await self.app(scope, again, send)
        return None

    async def _refuse(self, send: Any, status: int, headers: dict[str, str]) -> None:
        pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "not now"}}'})


@contextmanager
def watched(model: Path, api_key: str | None = None) -> Iterator[Watched]:
    """Our server with the model, behind a counter."""
    server = Watched("", create_app(Engine(model, max_seqs=4), "tiny", api_key))
    with run_app(server) as (url, _):
        server.url = url
        yield server
