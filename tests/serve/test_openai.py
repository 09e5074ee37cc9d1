"""The official `openai` client is content: chat, stream, models, schema, n, stop, seed, errors."""

from __future__ import annotations

import json

import openai
import pytest
from openai import OpenAI
from serving import Running, run_model
from tiny_model import write_tiny_model

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def chat(client: OpenAI, **fields):
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 12, **fields})


def test_models_and_retrieve(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "microlm"


def test_chat_has_id_role_reason_and_usage_that_adds_up(client):
    reply = chat(client, temperature=0)
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant" and reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12


def test_stream_equals_the_whole_answer(client):
    whole = chat(client, temperature=0)
    chunks = list(chat(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert {c.id for c in chunks} == {chunks[0].id} and len({c.created for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_json_schema_is_followed(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
        "required": ["city", "ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    reply = chat(client, response_format=wanted, max_tokens=100, seed=1)
    answer = json.loads(reply.choices[0].message.content)
    assert set(answer) == {"city", "ok"} and isinstance(answer["ok"], bool)
    assert reply.choices[0].finish_reason == "stop"


def test_n_gives_that_many_and_counts_the_prompt_once(client):
    one = chat(client, seed=5)
    reply = chat(client, n=3, seed=5, temperature=1)
    assert [c.index for c in reply.choices] == [0, 1, 2]
    assert reply.choices[0].message.content == one.choices[0].message.content
    assert len({c.message.content for c in reply.choices}) == 3
    assert reply.usage.prompt_tokens == one.usage.prompt_tokens and reply.usage.completion_tokens == 36


def test_n_streams_each_choice_with_its_own_role_and_reason(client):
    chunks = [c for c in chat(client, n=2, seed=5, stream=True) if c.choices]
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == "length"


def test_stop_string_ends_the_text_before_it(client):
    text = chat(client, temperature=0, max_tokens=24).choices[0].message.content
    stop = text[10:13]
    for value in (stop, [stop, "zzzzzz"]):
        reply = chat(client, temperature=0, max_tokens=24, stop=value).choices[0]
        assert reply.message.content == text[: text.index(stop)] and reply.finish_reason == "stop"


def test_equal_seeds_equal_texts(client):
    texts = [chat(client, temperature=1, seed=s).choices[0].message.content for s in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_max_completion_tokens_is_the_newer_name(client):
    limit = {"max_completion_tokens": 3, "temperature": 0}
    reply = client.chat.completions.create(model="tiny", messages=HELLO, **limit)
    assert reply.usage.completion_tokens == 3


def test_unlimited_chat_fills_the_window(client, server):
    reply = client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"ignore_eos": True})
    assert (
        reply.usage.total_tokens == server.engine.max_seq_len and reply.choices[0].finish_reason == "length"
    )


def test_text_parts_and_the_developer_role(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert chat(client, temperature=0, messages=parts).choices == chat(client, temperature=0).choices
    developer = [{"role": "developer", "content": "Be brief"}, *HELLO]
    system = [{"role": "system", "content": "Be brief"}, *HELLO]
    assert (
        chat(client, messages=developer, temperature=0).usage
        == chat(client, messages=system, temperature=0).usage
    )


def test_completions_of_text_ids_and_lists(client, server):
    ids = server.engine.tokenizer.encode("Once")
    ask = client.completions.create
    text = ask(model="tiny", prompt="Once", temperature=0).choices[0]
    assert text.finish_reason == "length" and len(text.text) > 0
    assert ask(model="tiny", prompt=ids, temperature=0).choices[0].text == text.text
    both = ask(model="tiny", prompt=["Once", "Twice"], temperature=0, n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3] and both.choices[1].text == text.text
    assert both.usage.prompt_tokens == len("OnceTwice")
    streamed = list(ask(model="tiny", prompt="Once", temperature=0, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == text.text


def test_error_classes(client, server):
    with pytest.raises(openai.NotFoundError) as gone:
        chat(client, model="gpt-4o")
    assert gone.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, messages=[{"role": "user", "content": "x" * 600}])
    assert long.value.code == "context_length_exceeded" and "512" in str(long.value)
    with pytest.raises(openai.BadRequestError) as tools:
        chat(client, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    assert tools.value.param == "tools" and tools.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        chat(client, response_format=bad)
    with pytest.raises(openai.APIStatusError) as big:
        chat(client, messages=[{"role": "user", "content": "x" * (2 << 20)}])
    assert big.value.status_code == 413


@pytest.mark.parametrize("stream", [True, False])
def test_damaged_weights_fail_the_request_and_not_the_server(tmp_path, stream):
    with run_model(write_tiny_model(tmp_path / "nan")) as broken:
        next(broken.engine._runner.decoder.parameters()).data.fill_(float("nan"))
        client = OpenAI(base_url=broken.url + "/v1", api_key="none", max_retries=0)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="not finite"):
                chat(client, stream=stream)
        assert broken.engine.free_slots == 4 and [m.id for m in client.models.list()] == ["tiny"]


@pytest.mark.anyio
async def test_async_client(server):
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
        fields = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 0}
        reply = await client.chat.completions.create(**fields)
        stream = await client.chat.completions.create(**fields, stream=True)
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
    assert text == reply.choices[0].message.content


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
