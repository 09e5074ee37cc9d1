"""llama.cpp renders our template as we do, and reads the calls and thinking of an answer out of its text.

The model is made by hand: each token is followed by one other, so that it says the answer we want.
Run as a program this file is the child in which llama.cpp answers the requests of a folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_models import as_dicts, tools_of, write_model

from microlm.core.records import Conversation, Message, ToolCall
from microlm.text.bpe import vocabulary
from microlm.text.chat import render, template_text
from microlm.text.tokenizer import Tokenizer
from microlm.text.vocab import gguf_file

TOOL = (
    '{"type": "function", "function": {"name": "add", "description": "求和", '
    '"parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}}'
)
CALL = ToolCall("add", '{"a": "x"}')
THOUGHT, ANSWER = "\n2 和 2\n", "\n\n四"
SAID = '\n{"name": "add", "arguments": {"a": "x"}}\n'
CHATS = [
    Conversation((Message("user", "你好"),)),
    Conversation(
        (
            Message("system", "简短。"),
            Message("user", "2  "),
            Message("assistant", "诗人", "想"),
            Message("user", "?\n"),
        )
    ),
    Conversation(
        (
            Message("user", "2"),
            Message("assistant", "看", tool_calls=(CALL, CALL)),
            Message("tool", "4"),
            Message("tool", "5"),
            Message("assistant", "四"),
            Message("user", "é"),
        ),
        tools=(TOOL, TOOL),
    ),
]


def answer(folder: Path) -> None:
    """The child: llama.cpp on `model.gguf` answers `requests.json` into `replies.json`."""
    import httpx
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = str(folder / "model.gguf")
    asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = 2048, 1, 0
    asked.warmup, asked.verbosity, asked.use_jinja = False, 0, True
    server = xllamacpp.Server(asked)
    with httpx.Client(base_url=server.listening_address, trust_env=False, timeout=60.0) as client:
        requests = json.loads((folder / "requests.json").read_bytes())
        replies = [client.post(path, json=body).json() for path, body in requests]
    (folder / "replies.json").write_text(json.dumps(replies), encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    pytest.importorskip("xllamacpp")
    path = write_model(
        tmp_path_factory.mktemp("run") / "t", template_text("小明"), words=(SAID, THOUGHT, ANSWER)
    )
    return Tokenizer.load(path)


def replies(
    tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch, chain: list[str], requests: Any
) -> list[Any]:
    """What llama.cpp answers, by a model that writes the tokens of `chain`, each after the one before it."""
    import gguf

    known = vocabulary.read(tokenizer.path / "tokenizer.json")
    table = {tokenizer.token_bytes[i]: i for i in range(tokenizer.vocab_size)}
    ids = [tokenizer.control.get(token) or table[token.encode()] for token in chain]

    def tensors(writer: Any, vocab_size: int) -> None:
        embedding, output = (np.zeros((vocab_size, 32), dtype=np.float32) for _ in range(2))
        for place, (token, after) in enumerate(pairwise(ids)):
            embedding[token, place] = output[after, place] = 4
        writer.add_tensor("token_embd.weight", embedding)
        writer.add_tensor("output.weight", output)
        writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.0.{name}.weight", np.zeros(32, dtype=np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.0.{name}.weight", np.zeros((32, 32), dtype=np.float32))

    length = gguf.GGUFWriter.add_context_length
    monkeypatch.setattr(gguf_file, "_add_tensors", tensors)
    monkeypatch.setattr(gguf.GGUFWriter, "add_context_length", lambda writer, _: length(writer, 2048))
    template = (tokenizer.path / "chat_template.jinja").read_text(encoding="utf-8")
    vocab = gguf_file.Vocab(known, "gpt-2", tokenizer.eos_id, tokenizer.pad_id, template)
    gguf_file.write(folder / "model.gguf", vocab, tensors=True)
    (folder / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found: list[Any] = json.loads((folder / "replies.json").read_bytes())
    return found


def test_the_prompt_is_ours(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        ("/apply-template", {"messages": as_dicts(chat), "tools": tools_of(chat) or []}) for chat in CHATS
    ]
    found = replies(tokenizer, tmp_path, monkeypatch, ["\n", "<|im_end|>"], requests)
    ours = [render(tokenizer, chat.messages, True, chat.tools) for chat in CHATS]
    assert [reply.get("prompt") for reply in found] == ours


def test_calls_are_read_out_of_the_answer(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = ["\n", "<tool_call>", SAID, "</tool_call>", "<|im_end|>"]
    text = render(tokenizer, [Message("assistant", "", tool_calls=(CALL,))]).split("<|im_start|>assistant")[1]
    assert text == "".join(chain) + "\n"
    body = {
        "messages": [{"role": "user", "content": "2"}],
        "tools": [json.loads(TOOL)],
        "max_tokens": 40,
        "temperature": 0,
    }
    [reply] = replies(tokenizer, tmp_path, monkeypatch, chain, [("/v1/chat/completions", body)])
    [choice] = reply["choices"]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add" and json.loads(call["function"]["arguments"]) == {"a": "x"}


def test_thinking_is_read_out_of_the_answer(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = ["\n", "<think>", THOUGHT, "</think>", ANSWER, "<|im_end|>"]
    answer = Message("assistant", ANSWER.strip(), THOUGHT.strip())
    assert render(tokenizer, [answer]).split("<|im_start|>assistant")[1] == "".join(chain) + "\n"
    body = {"messages": [{"role": "user", "content": "2"}], "max_tokens": 40, "temperature": 0}
    [reply] = replies(tokenizer, tmp_path, monkeypatch, chain, [("/v1/chat/completions", body)])
    message = reply["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"].strip()) == (answer.content, answer.reasoning)


if __name__ == "__main__":
    answer(Path(sys.argv[1]))
