"""`microlm serve` as a process: starts, answers, drains on SIGTERM, dies with a sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from microlm.core.client import Client, EndpointError
from microlm.core.errors import UserError
from microlm.core.records import Message, Sampling
from microlm.serve.launch import ServerProcess

HELLO = (Message("user", "Hello"),)


@pytest.mark.slow
def test_serves_drains_on_sigterm_and_exits_0(model_dir, tmp_path):
    server = ServerProcess(model_dir, api_key="a-key-of-its-own", log=tmp_path / "log")
    with server:
        with Client(server.url, "a-key-of-its-own") as client:
            assert client.models() == [model_dir.name]
            stream = client.chat_stream(HELLO, Sampling(max_tokens=400, ignore_eos=True))
            next(stream)
            os.kill(server.pid, signal.SIGTERM)
            last = list(stream)[-1]
        assert last.usage.completion_tokens == 400 and server.stop() == 0
    assert "/v1/chat/completions 200" in (tmp_path / "log").read_text()
    assert "a-key-of-its-own" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_directory_without_a_model_is_the_sentence(tmp_path):
    with pytest.raises(UserError, match="ended with code 2") as e, ServerProcess(tmp_path):
        pass
    assert str(tmp_path) in str(e.value)


def test_a_late_server_is_stopped(model_dir):
    server = ServerProcess(model_dir, timeout_s=0.2)
    with pytest.raises(UserError, match=r"not ready within 0\.2 s"):
        server.start()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


@pytest.mark.slow
def test_ctrl_c_is_130_and_the_snippet_is_printed(model_dir):
    command = [sys.executable, "-m", "microlm", "serve", str(model_dir), "--port", "0", "--name", "mine"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = [process.stdout.readline() for _ in range(3)]
    assert "'mine' at http://127.0.0.1:" in first[0] and "from openai import OpenAI" in first[2]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "a key is needed"),
        (["--port", "70000"], "65535"),
        (["--api-key-file", "/nowhere/key"], "/nowhere/key"),
    ],
)
def test_refusals_come_before_any_loading(model_dir, words, said):
    command = [sys.executable, "-m", "microlm", "serve", str(model_dir), *words]
    env = {k: v for k, v in os.environ.items() if k != "MICROLM_API_KEY"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_wrong_key_is_an_endpoint_error(server, model_dir):
    with Client(server.url) as client, pytest.raises(EndpointError, match="no-model") as e:
        client.chat(HELLO, model="no-model")
    assert e.value.status == 404
