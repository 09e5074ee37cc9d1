"""Our client: replies, deltas with times, sentences for what is no OpenAI server."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlm.core.client import Client, EndpointError
from microlm.core.endpoint import root_url
from microlm.core.errors import UserError
from microlm.core.payload import split_events, wire
from microlm.core.records import Constraint, Message, Sampling

HELLO = (Message("user", "Hello"),)
EVENT = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'


def test_stream_equals_whole_and_times_rise(server):
    with Client(server.url + "/v1") as client:
        assert client.health() and client.models() == ["tiny"]
        whole = client.chat(HELLO, Sampling(max_tokens=20))
        deltas = list(client.chat_stream(HELLO, Sampling(max_tokens=20)))
        raw = client.complete("Once", Sampling(max_tokens=5))
    assert "".join(d.text for d in deltas) == whole.text
    assert deltas[-1].usage == whole.usage and deltas[-2].finish_reason == whole.finish_reason
    times = [d.received_s for d in deltas]
    assert times == sorted(times) and times[-1] > times[0]
    assert raw.usage.prompt_tokens == 4 and raw.finish_reason == "length"


def test_closing_a_stream_frees_the_slot(server):
    with Client(server.url) as client:
        stream = client.chat_stream(HELLO, Sampling(max_tokens=450, ignore_eos=True))
        next(stream)
        stream.close()
        deadline = time.monotonic() + 20
        while server.engine.free_slots < 4:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_sampling_on_the_wire():
    schema = '{"type": "object"}'
    full = Sampling(5, 0.5, 0.9, 7, 3, ("a",), Constraint("json_schema", schema), ignore_eos=True)
    assert wire(Sampling()) == {"max_tokens": 128, "temperature": 0.0}
    assert wire(full)["response_format"]["json_schema"]["schema"] == json.loads(schema)
    assert {k: wire(full)[k] for k in ("top_p", "top_k", "seed", "stop", "ignore_eos")} == {
        "top_p": 0.9,
        "top_k": 7,
        "seed": 3,
        "stop": ["a"],
        "ignore_eos": True,
    }


@given(st.lists(st.text(min_size=1).filter(lambda t: not set(t) & {"\r", "\n"}), max_size=5), st.data())
def test_events_do_not_depend_on_the_cuts(texts, data):
    whole = "".join(f"data: {t}\n\n" for t in texts).encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    chunks = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    expected = [t.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for t in texts]
    assert [e.data for e in split_events(chunks)] == expected


def test_event_lines_follow_the_rules():
    raw = [b": comment\r\nevent: x\r\ndata: a\r", b"\ndata:b\r\n\r\n", b"data: c\n\ndata: tail\n"]
    assert [e.data for e in split_events(raw)] == ["a\nb", "c", "tail"]
    for endless in ([b"data: " + b"x" * (9 << 20)], [b"data: " + b"x" * (1 << 20) + b"\n"] * 9):
        with pytest.raises(UserError, match="longer than"):
            list(split_events(endless))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://h:99999", "http://h:x"])
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="http://127"):
        root_url(url)


def test_addresses_lose_their_tail():
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", " http://h:1/v1/ "):
        assert root_url(url) == "http://h:1"


@contextmanager
def listening(handler):
    """The address of a server that answers as the handler says."""
    handler.log_message = lambda *_: None
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def saying(status: int, kind: str, content: bytes):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content)

    return listening(Handler)


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (200, b"<html>hello</html>", "not a JSON object"),
        (200, b"[1]", "not a JSON object"),
        (200, b"{}", "'choices' is None"),
        (200, b'{"choices": []}', "'choices' is empty"),
        (200, b'{"choices": [{"message": null}]}', "no text"),
        (200, b'{"choices": [{"message": {"content": 5}}]}', "'content' is 5, expected a text"),
        (200, b'{"choices": [{"text": "x"}], "usage": "some"}', "'usage' is 'some', expected an object"),
        (200, b'{"choices": [{"text": "x"}], "usage": {"total_tokens": true}}', "expected a count"),
        (200, b'{"choices": [{"text": "\\ud83d"}]}', "half a character"),
        (500, b"oops", "HTTP 500: no error message"),
        (400, b'{"error": {"message": "too long"}}', "HTTP 400: too long"),
        (400, b'{"error": "flat"}', "HTTP 400"),
    ],
)
def test_answers_that_are_not_openai(status, content, said):
    with saying(status, "application/json", content) as url, Client(url) as client:
        with pytest.raises(EndpointError, match=said) as e:
            client.chat(HELLO, model="m")
        assert e.value.status == status


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("application/json", b"{}", "does this server stream"),
        ("text/event-stream", b"data: nonsense\n\n", "not a JSON object"),
        ("text/event-stream", b'data: {"choices": null}\n\n', "'choices' is None"),
        ("text/event-stream", b'data: {"choices": [null]}\n\n', "expected a list of objects"),
        ("text/event-stream", b'data: {"choices": [{"delta": "x"}]}\n\n', "'delta' is 'x'"),
        ("text/event-stream", b'data: {"choices": [{"delta": {"content": []}}]}\n\n', "expected a text"),
        ("text/event-stream", b'data: {"choices": [], "usage": [1]}\n\n', "'usage' is"),
        ("text/event-stream", b'data: {"error": {"message": "fell over"}}\n\n', "fell over"),
    ],
)
def test_streams_that_are_not_openai(kind, content, said):
    with saying(200, kind, content) as url, Client(url) as client, pytest.raises(EndpointError, match=said):
        list(client.chat_stream(HELLO, model="m"))


def test_what_is_no_text_is_not_sent():
    with Client("http://127.0.0.1:9") as client, pytest.raises(UserError, match="lone surrogate"):
        client.chat((Message("user", "a\ud800"),), model="m")


def test_nobody_there():
    with (
        Client("http://127.0.0.1:9", timeout_s=2) as client,
        pytest.raises(UserError, match="cannot connect"),
    ):
        client.health()


def dripping(pieces: int, pause_s: float, kind: str = "text/event-stream", piece: bytes = EVENT):
    """An answer with a pause before each piece, a stream of events unless told otherwise."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            try:
                for _ in range(pieces):
                    time.sleep(pause_s)
                    self.wfile.write(piece)
                self.wfile.write(b"data: [DONE]\n\n")
            except OSError:  # the client has left
                pass

    return listening(Handler)


def test_a_stream_may_last_as_long_as_it_moves():
    with dripping(pieces=8, pause_s=0.2) as url, Client(url, timeout_s=0.8) as client:
        assert "".join(d.text for d in client.chat_stream(HELLO, model="m")) == "x" * 8


def test_a_stream_that_stands_still_is_an_error():
    with dripping(pieces=1, pause_s=2.0) as url, Client(url, timeout_s=0.3) as client:
        started = time.monotonic()
        with pytest.raises(UserError, match=r"nothing came for 0\.3 s"):
            list(client.chat_stream(HELLO, model="m"))
        assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    ("kind", "piece"),
    [
        ("text/event-stream", EVENT),
        ("text/event-stream", b": ping\n\n"),
        ("text/event-stream", b"data: x\n"),
        ("application/json", b" "),
    ],
)
def test_an_answer_that_only_moves_ends_at_the_deadline(kind, piece):
    with (
        dripping(60, 0.05, kind, piece) as url,
        Client(url, timeout_s=2, deadline_s=0.3) as client,
        pytest.raises(UserError, match=r"/v1/chat/completions: the answer did not end within 0\.3 s"),
    ):
        started = time.monotonic()
        try:
            if kind == "application/json":
                client.chat(HELLO, model="m")
            else:
                list(client.chat_stream(HELLO, model="m"))
        finally:
            assert time.monotonic() - started < 2
