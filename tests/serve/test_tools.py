"""Tools, calls and thinking of a request reach the template: the prompt's tokens are those of the records."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from serving import Running

from microlm.core.client import Client
from microlm.core.payload import chat_turns, tool_fields
from microlm.core.records import Conversation, Message, Sampling, ToolCall
from microlm.engine.engine import Engine
from microlm.engine.prompts import encode_prompt
from microlm.serve.wire import ChatRequest
from microlm.text.chat import chat_ids
from microlm.text.chat.chatml import ChatML
from microlm.text.tokenizer import Tokenizer

TOOL = '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}'
CALL = ToolCall("add", '{"numbers": [2, 2]}')
CHAT = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "2 + 2?"),
        Message("assistant", "", "two and two", (CALL, CALL)),
        Message("tool", "4"),
        Message("tool", "4"),
        Message("user", "And?"),
    ),
    tools=(TOOL,),
)


def body(chat: Conversation) -> dict:
    return {"model": "tiny", "messages": chat_turns(chat.messages), **tool_fields(chat.tools)}


def test_a_request_is_read_back_as_the_records_it_was_written_from() -> None:
    assert ChatRequest(**body(CHAT)).conversation == CHAT
    bare = body(CHAT) | {"tools": [{"name": "add", "parameters": {"type": "object"}}]}
    assert ChatRequest(**bare).conversation == CHAT
    ids = [call["id"] for call in body(CHAT)["messages"][2]["tool_calls"]]
    assert ids == [turn["tool_call_id"] for turn in body(CHAT)["messages"][3:5]]


def test_an_answer_that_comes_back_as_text_is_what_it_was() -> None:
    """Our answers hold thinking and calls as text; a client sends them back as they came."""
    answer = CHAT.messages[2]
    text = ChatML().render(Conversation((answer,))).split("assistant\n", 1)[1].removesuffix("<|im_end|>\n")
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    asked, said = ChatRequest(model="tiny", messages=turns).conversation.messages
    assert said == answer and asked == Message("user", text)
    broken = [{"role": "assistant", "content": '<tool_call>{"no": 1}</tool_call>'}]
    [kept] = ChatRequest(model="tiny", messages=broken).conversation.messages
    assert kept == Message("assistant", '<tool_call>{"no": 1}</tool_call>')


def test_the_prompt_of_a_request_is_the_one_of_its_records(server: Running, model_dir: Path) -> None:
    tokenizer = Tokenizer.load(model_dir)
    asked = len(chat_ids(tokenizer, CHAT, generation_prompt=True))
    short = Conversation(CHAT.messages[:2])
    assert asked > len(chat_ids(tokenizer, short, generation_prompt=True)) + 100
    sent = body(CHAT) | {"max_tokens": 1}
    reply = httpx.post(server.url + "/v1/chat/completions", json=sent, timeout=120)
    if reply.status_code == 400:  # the tiny model's window is smaller than the conversation
        assert f"{asked} tokens" in reply.json()["error"]["message"]
    else:
        assert reply.json()["usage"]["prompt_tokens"] == asked


def test_the_client_sends_what_the_server_reads(server: Running, model_dir: Path) -> None:
    chat = Conversation((Message("user", "2?"), Message("assistant", "2", "so"), Message("user", "3?")))
    reply = Client(server.url).chat(chat.messages, Sampling(max_tokens=1), "tiny")
    tokenizer = Tokenizer.load(model_dir)
    assert reply.usage and reply.usage.prompt_tokens == len(chat_ids(tokenizer, chat, generation_prompt=True))


def test_the_engine_takes_a_conversation_with_tools(model_dir: Path) -> None:
    engine = Engine(model_dir)
    size = engine.config.vocab_size
    asked = encode_prompt(engine.tokenizer, CHAT, size)
    assert asked == chat_ids(engine.tokenizer, CHAT, generation_prompt=True)
    alone = Conversation(CHAT.messages)
    assert encode_prompt(engine.tokenizer, CHAT.messages, size) == encode_prompt(
        engine.tokenizer, alone, size
    )
    assert len(asked) > len(encode_prompt(engine.tokenizer, alone, size))


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "add"}}])
def test_calls_are_not_promised(server: Running, choice: object) -> None:
    sent = body(CHAT) | {"tool_choice": choice}
    reply = httpx.post(server.url + "/v1/chat/completions", json=sent, timeout=120)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "tool_choice"
