"""A small finished run to break, a room to break it in, and disks that refuse. For tests of bad input."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from artifacts import sign, write_data, write_model, write_tokenizer

from microlm.core.artifact import Artifact, Workspace
from microlm.model import directory, lora
from microlm.text import shards

LINES = [f'{{"text": "第{i}篇文章说的是一位诗人。"}}'.encode() for i in range(9)]
CORPUS = b"\n".join(LINES) + b"\n"


def write_adapter(out: Path, base: Artifact) -> Artifact:
    """An adapter of `base` that changes it."""

    def body(work: Workspace) -> None:
        decoder = directory.load(base.path)
        lora.apply(decoder, lora.LoraConfig(2, 4.0), torch.Generator().manual_seed(5))
        lora.save_adapter(decoder, work.path, base.path.name, base.digest)

    return sign(out, "adapter", body, model=str(base.path))


def write_run(root: Path) -> Path:
    """data → tokenizer → shards, sft; sft → lora, predictions → scores; another model and its adapter."""
    data = write_data(root / "data", repeat=2)
    tokenizer = write_tokenizer(root / "tokenizer", data)
    fields: dict[str, Any] = {"data": f"{root}/data", "tokenizer": f"{root}/tokenizer"}
    shards.run(shards.TokenizeRecipe(out=f"{root}/shards", **fields))
    model = write_model(root / "sft", tokenizer, data)
    write_adapter(root / "lora", model)
    other = write_model(root / "other", tokenizer, data, seed=1)
    write_adapter(root / "other-lora", other)
    asked = sign(root / "predictions", "predictions", lambda work: None, model=str(model.path))
    scores: dict[str, Any] = {"schema": 1, "headlines": []}
    sign(
        root / "scores", "scores", lambda w: w.write_json("scores.json", scores), predictions=str(asked.path)
    )
    return root


@dataclass
class Room:
    """An empty working directory with a copy of the run in `runs/`, in which a case breaks something."""

    path: Path
    patch: pytest.MonkeyPatch

    def write(self, name: str, data: bytes | str) -> str:
        """A file; returns its name."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return name

    def recipe(self, text: bytes | str, *words: str) -> list[str]:
        """`microlm run` on a recipe of this text."""
        return ["run", self.write("recipe.yaml", text), *words]

    def stage(self, stage: str, **fields: Any) -> list[str]:
        """`microlm run` on a recipe of one stage, into `out/STAGE`."""
        return self.recipe(yaml.safe_dump({"stage": stage, "out": f"out/{stage}"} | fields))

    def corpus(self, data: bytes, name: str = "corpus.jsonl", **fields: Any) -> list[str]:
        """`microlm run` on a data recipe whose source is this file."""
        kind = "text" if name.endswith(".txt") else "jsonl"
        source = f"{kind}:{self.write(name, data)}"
        clean = {"min_chars": fields.pop("min_chars", 1)}
        return self.stage("data", **({"source": source, "fill": "none", "clean": clean} | fields))

    def pipeline(self, *words: str) -> list[str]:
        """`microlm run` on a pipeline of two stages."""
        entry = {"stage": "data", "source": f"jsonl:{self.write('corpus.jsonl', CORPUS)}", "fill": "none"}
        stages = [entry, {"stage": "tokenizer", "data": "data", "vocab_size": 300}]
        return self.recipe(yaml.safe_dump({"name": "toy", "output": "out", "stages": stages}), *words)

    def change(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Rewrite a file of the room."""
        path = self.path / name
        path.write_bytes(change(path.read_bytes()))

    def unlink(self, name: str) -> None:
        """Take a file away."""
        (self.path / name).unlink()

    def flip(self, name: str, at: float = 0.9) -> None:
        """Change one bit of a file, at this share of its length."""

        def flipped(data: bytes) -> bytes:
            i = int(at * (len(data) - 1))
            return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]

        self.change(name, flipped)

    def files(self) -> dict[str, str]:
        """Every file in the room and the hash of its bytes."""
        found = (p for p in self.path.rglob("*") if p.is_file())
        return {str(p.relative_to(self.path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}

    def folders(self) -> set[str]:
        """Every folder in the room."""
        return {str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_dir()}


@contextmanager
def make_room(run: Path, path: Path) -> Iterator[Room]:
    """A room with a copy of `run`, as working directory."""
    with pytest.MonkeyPatch.context() as patch:
        shutil.copytree(run, path / "runs")
        patch.chdir(path)
        patch.delenv("MICROLM_DEBUG", raising=False)
        patch.delenv("MICROLM_API_KEY", raising=False)
        yield Room(path, patch)


def _refuse(code: int, path: Path | None) -> OSError:
    return OSError(code, os.strerror(code), *([str(path)] if path else []))


class _Metered:
    """A file on a disk with a given number of bytes left."""

    def __init__(self, inner: Any, left: list[int], path: Path) -> None:
        self._inner, self._left, self._path = inner, left, path

    def write(self, data: Any) -> int:
        self._left[0] -= len(data)
        if self._left[0] < 0:
            raise _refuse(errno.ENOSPC, self._path)
        return int(self._inner.write(data))

    def __enter__(self) -> _Metered:
        return self

    def __exit__(self, *_: Any) -> None:
        self._inner.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def fill_disk(patch: pytest.MonkeyPatch, bytes_left: int) -> None:
    """Every file opened for writing shares `bytes_left`; what goes beyond is ENOSPC."""
    left, real = [bytes_left], Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file: Any = real(self, mode, *args, **kwargs)
        return _Metered(file, left, self) if set(mode) & set("wax+") else file

    patch.setattr(Path, "open", opened)


def fail_at(patch: pytest.MonkeyPatch, owner: Any, name: str, code: int, after: int = 0) -> None:
    """`owner.name(…)` raises this errno from its call number `after` on."""
    real, calls = getattr(owner, name), [0]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise _refuse(code, args[0] if isinstance(args[0], Path) else None)
        return real(*args, **kwargs)

    patch.setattr(owner, name, wrapper)


def lock_folder(patch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Nothing can be made under a folder of this name (root may write into any, so no mode bits)."""
    mkdir, open_ = Path.mkdir, Path.open

    def inside(path: Path) -> bool:
        return name in path.absolute().parts

    def made(self: Path, *args: Any, **kwargs: Any) -> None:
        if inside(self) and not self.exists():
            raise _refuse(code, self)
        mkdir(self, *args, **kwargs)

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if inside(self) and set(mode) & set("wax+"):
            raise _refuse(code, self)
        return open_(self, mode, *args, **kwargs)

    patch.setattr(Path, "mkdir", made)
    patch.setattr(Path, "open", opened)


class _Greeter(BaseHTTPRequestHandler):
    """A web server that knows nothing of models."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<h1>It works!</h1>")

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def plain_web_server() -> Iterator[str]:
    """The address of a server that answers every request with a page."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Greeter)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Prepare = Callable[[Room], list[str]]
"""Breaks something in the room; returns the words to call `microlm` with."""
