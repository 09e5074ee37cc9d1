"""A small OpenAI-compatible server without a model, which can be broken in one place at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, float("nan"), 10**400, "", "x", "\ud800",
    [], {}, [None], [[]], ["x"], {"x": []}, {"message": 5},
)  # fmt: skip
TEXT = "the sea was calm and the old boat went far out to where no bird had been seen before"


MALFORMED: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "choices text": (("choices",), "none"),
    "choices null": (("choices",), None),
    "choice text": (("choices", 0), "one"),
    "choice null": (("choices", 0), None),
    "delta text": (("choices", 0, "delta"), "hello"),
    "delta list": (("choices", 0, "delta"), []),
    "delta content object": (("choices", 0, "delta", "content"), {"text": "hello"}),
    "delta content number": (("choices", 0, "delta", "content"), 5),
    "delta content half a character": (("choices", 0, "delta", "content"), "\ud83d"),
    "delta role list": (("choices", 0, "delta", "role"), ["assistant"]),
    "message text": (("choices", 0, "message"), "hello"),
    "message content list": (("choices", 0, "message", "content"), ["hello"]),
    "message content number": (("choices", 0, "message", "content"), 5),
    "message content half a character": (("choices", 0, "message", "content"), "\ud83d"),
    "finish_reason object": (("choices", 0, "finish_reason"), {"why": "stop"}),
    "usage text": (("usage",), "some"),
    "usage list": (("usage",), [1, 2, 3]),
    "usage counts text": (("usage", "prompt_tokens"), "7"),
    "usage counts true": (("usage", "completion_tokens"), True),
    "usage counts negative": (("usage", "completion_tokens"), -1),
    "id null": (("id",), None),
    "id list": (("id",), []),
}
"""Faults by name: where in an answer, or in an event of a stream, another value stands, and which."""


def plant(value: Any, path: tuple[str | int, ...], junk: Any) -> Any:
    """`value` with `junk` at `path`; as it is when it has no such place."""
    if not path:
        return junk
    copy = value.copy()
    copy[path[0]] = plant(copy[path[0]], path[1:], junk)
    return copy


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


class Handler(BaseHTTPRequestHandler):
    """Answers as it should, except where `fault` says otherwise. One word is one token."""

    fault: ClassVar[str] = ""
    counter: ClassVar[Iterator[int]] = itertools.count()
    dice: ClassVar[random.Random | None] = None
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self.send_json({}, 500 if self.fault == "unhealthy" else 200)
        elif self.path == "/v1/models":
            data = [] if self.fault == "no models" else [{"id": "toy", "object": "model"}]
            self.send_json({"object": "list", "data": data})
        else:
            self.refuse(404, "no such route")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            body = json.loads(raw)
            float(body.get("temperature", 1))
            messages = (
                [{"content": body["prompt"]}] if self.path == "/v1/completions" else list(body["messages"])
            )
        except (ValueError, TypeError, KeyError):
            return self.refuse(400, "bad request")
        if body["model"] != "toy" and self.fault != "any model":
            return self.refuse(404, "no such model")
        if self.path == "/v1/completions" and self.fault == "no completions":
            return self.refuse(404, "no such route")
        if "response_format" in body and self.fault == "no schema":
            return self.refuse(400, "no response_format")
        text, reason, counts = self.generate(body, messages)
        if self.path == "/v1/completions":
            choice = {"index": 0, "text": text, "finish_reason": reason}
            return self.send_json(
                {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": counts}
            )
        if body.get("stream"):
            return self.send_stream(text, reason, counts)
        if self.fault == "spaces without end":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            return self.drip(b" ")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "toy"}
        return self.send_json(head | {"choices": [choice], "usage": counts})

    def generate(
        self, body: dict[str, Any], messages: list[dict[str, str]]
    ) -> tuple[str, str, dict[str, int]]:
        if self.fault == "history ignored":
            messages = messages[-1:]
        if self.fault == "assistant's turns dropped":
            messages = [m for m in messages if m.get("role") != "assistant"]
        prompt = " ".join(m["content"] for m in messages)
        asked = len(prompt.split())
        if self.fault == "history counted only":
            prompt = messages[-1]["content"]
        warm = body.get("temperature", 1) > 0 and self.fault != "always greedy"
        seed = body.get("seed", next(self.counter)) if warm else 0
        if warm and self.fault == "seed ignored":
            seed = next(self.counter)
        if warm and self.fault == "one seed for all" and "seed" in body:
            seed = 0
        mixer = random.Random(hashlib.sha256(f"{prompt}{seed}".encode()).digest())
        rare = {"confident model": 0.03 * body.get("temperature", 1) ** 3, "stubborn model": 0.03}
        if mixer.random() >= rare.get(self.fault, 1):
            mixer = random.Random(hashlib.sha256(prompt.encode()).digest())
        limit = 40 if self.fault == "max_tokens ignored" else body["max_tokens"]
        tokens = [mixer.choice(TEXT.split()) + " " for _ in range(min(limit, 40))]
        reason = "length" if len(tokens) == limit or self.fault == "max_tokens ignored" else "stop"
        text = "".join(tokens)
        if "response_format" in body and self.fault != "schema ignored":
            text, reason = self.fill(body["response_format"]["json_schema"]["schema"]), "stop"
        if self.fault == "characters cut":
            text = text.encode("ascii", "replace").decode().replace("?", "\ufffd")
        if self.fault == "accents lost":
            text = text.replace("é", "e")
        for stop in body.get("stop", []):
            if stop in text and self.fault != "stop ignored":
                text, reason = text[: text.index(stop)], "stop"
                if self.fault == "stop kept":
                    text += stop
        extra = 3 if self.fault == "usage wrong" else 0
        made = len(tokens) + extra
        total = asked + made + (1 if self.fault == "usage does not add up" else 0)
        return text, reason, {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": total}

    def fill(self, schema: dict[str, Any]) -> str:
        values = {"string": "Li Bai", "boolean": False}
        made = {
            name: p["const"] if "const" in p else p["enum"][0] if "enum" in p else values[p["type"]]
            for name, p in schema["properties"].items()
        }
        return json.dumps(made, ensure_ascii=False)

    def send_stream(self, text: str, reason: str, counts: dict[str, int]) -> None:
        if self.fault == "stream not offered":
            return self.refuse(400, "no streams")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        if self.fault == "chunk twice":
            pieces.insert(1, pieces[0])
        if self.fault == "split characters":
            pieces = ["\ufffd\ufffd" if not p.isascii() else p for p in pieces]
        first = {} if self.fault == "no role" else {"role": "assistant", "content": ""}
        deltas: list[tuple[dict[str, str], str | None]] = [
            (first, None),
            *(({"content": p}, None) for p in pieces),
        ]
        deltas.append(({}, None if self.fault == "no reason" else reason))
        for number, (delta, why) in enumerate(deltas):
            if self.fault == "pings without end":
                self.drip(b": ping\n\n")
            while self.fault == "stream without end":
                time.sleep(0.05)
                self.send_chunk(
                    number, [{"index": 0, "delta": {**first, "content": "x"}, "finish_reason": None}]
                )
            self.send_chunk(number, [{"index": 0, "delta": delta, "finish_reason": why}])
        if self.fault != "no usage chunk":
            self.send_chunk(len(deltas), [], usage=counts)
        if self.fault != "no DONE":
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def send_chunk(self, number: int, choices: list[Any], **more: Any) -> None:
        name = f"chatcmpl-{number}" if self.fault == "ids change" else "chatcmpl-1"
        head = {"id": name, "object": "chat.completion.chunk", "created": 1, "model": "toy"}
        if self.fault == "stream not JSON":
            self.wfile.write(b"data: {nonsense\n\n")
        if self.fault == "stream not UTF-8":
            self.wfile.write(b"data: \xff\xfe\n\n")
        data = json.dumps(self.spoil(head | {"choices": choices} | more))
        self.wfile.write(f"data: {data}\n\n".encode())

    def spoil(self, value: Any) -> Any:
        """What is sent instead of `value`: with the planted junk, or with junk where the dice fall."""
        if self.dice is not None and self.dice.random() < 0.3:
            return plant(value, self.dice.choice(list(places(value))), self.dice.choice(JUNK))
        path, junk = MALFORMED.get(self.fault, ((), None))
        return plant(value, path, junk) if path in places(value) and path else value

    def drip(self, piece: bytes) -> None:
        """The piece again and again; for so long that a client without a deadline is seen to wait."""
        for _ in range(100):
            time.sleep(0.05)
            self.wfile.write(piece)

    def refuse(self, status: int, message: str) -> None:
        if self.fault == "error not JSON":
            self.send_bytes(b"<h1>Bad Request</h1>", status, "text/html")
        elif self.fault == "error 500":
            self.send_json({"error": {"message": message}}, 500)
        else:
            self.send_json({"error": {"message": message}}, status)

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send_bytes(json.dumps(self.spoil(value)).encode(), status, "application/json")

    def send_bytes(self, content: bytes, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def broken(fault: str = "", dice: random.Random | None = None, unseeded: int = 0) -> Iterator[str]:
    """The URL of a server with this fault, or with junk in its answers wherever the dice fall.

    `unseeded` is the first of the seeds that requests without one get, in turn.
    """
    kind = type("Broken", (Handler,), {"fault": fault, "counter": itertools.count(unseeded), "dice": dice})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
