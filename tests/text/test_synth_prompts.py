"""Learning from an endpoint: prompts of a corpus, answered by a teacher, whatever cuts it off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from artifacts import sign, write_data
from serving import run_app
from synth_runs import Watched, lines, payload, seeds, watched
from tiny_model import write_tiny_model

from microlm.core import runtime
from microlm.core.artifact import Artifact
from microlm.core.errors import UserError
from microlm.core.recipe import build
from microlm.core.records import Conversation, Message, Sampling, ToolCall
from microlm.engine import Engine
from microlm.text.read import read_records
from microlm.text.shards import TokenizeRecipe, open_sets
from microlm.text.shards import run as tokenize
from microlm.text.synth.stage import SynthRecipe, run

DRAW = {"max_tokens": 64, "temperature": 1.0, "stop": ["a", "e", "i", "o", "u"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TALK = [
    {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Let me think."},
    {"role": "user", "content": "And?"}, {"role": "assistant", "content": "an old answer"},
]  # fmt: skip
ROWS = [
    {"messages": TALK, "task": "arithmetic"},
    {"messages": TALK[:1], "task": "chat"},
    {"messages": TALK[:2], "task": "chat"},  # the same prompt
    {"messages": TALK[1:2]},  # nobody asks
    {"prompt": "Who?", "chosen": "Li Bai", "rejected": "nobody"},
    {"text": "Li Bai was a poet.", "relation": [], "allowed": ["job"], "cate": "x", "lang": "en"},
    {"text": "a document"},
    {"role": "?"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Watched]:
    with watched(model) as running:
        yield running


@pytest.fixture
def asked(tmp_path: Path) -> str:
    return seeds(tmp_path / "asked.jsonl", ROWS)


def distil(out: Path, url: str, **fields: Any) -> Artifact:
    values = {"out": str(out), "prompts": {}, "licence": "CC0-1.0", "draw": DRAW, "endpoint": {"url": url}}
    return run(build(SynthRecipe, values | fields, "test"))


def chats(made: Artifact) -> list[Conversation]:
    return list(read_records(made.file("conversations/train.jsonl"), Conversation))


def test_each_prompt_gets_the_teachers_answer(
    server: Watched, model: Path, asked: str, tmp_path: Path
) -> None:
    made = distil(tmp_path / "out", server.url, seeds=asked)
    counts, kept = made.json("counts.json"), chats(made)
    assert counts["asked"] == 8 and counts["accepted"] == len(kept) == 4
    assert counts["dropped"]["duplicate_prompt"] == 1 and counts["dropped"]["no_prompt"] == 2
    assert [c.task for c in kept] == ["arithmetic", "chat", "chat", "extraction"]
    assert [[m.content for m in c.messages[:-1]] for c in kept] == [
        ["2 + 2?", "Let me think.", "And?"], ["2 + 2?"], ["Who?"],
        ["Extract as JSON: job\nText: Li Bai was a poet."],
    ]  # fmt: skip
    assert {c.licence for c in kept} == {"CC0-1.0"} == set(made.manifest["licences"])
    assert made.manifest["metrics"]["teachers"] == {"tiny": 4}
    assert {row["model"] for row in lines(made.file("requests.jsonl")) if "model" in row} == {"tiny"}
    engine = Engine(model, max_seqs=4)
    for chat in kept:
        name = chat.source.removeprefix("synth:")
        seed = runtime.derive_seed(0, "answer", name, 0) % (1 << 31)
        sampling = Sampling(max_tokens=64, temperature=1.0, stop=("a", "e", "i", "o", "u"), seed=seed)
        [answer] = engine.generate([list(chat.messages[:-1])], sampling)
        assert chat.messages[-1] == Message("assistant", answer.text.strip())


def test_what_was_answered_is_not_asked_again(server: Watched, asked: str, tmp_path: Path) -> None:
    whole = distil(tmp_path / "whole", server.url, seeds=asked)
    server.answered, server.gone_after = 0, 2
    try:
        with pytest.raises(UserError, match="run the same command again to continue"):
            distil(tmp_path / "out", server.url, seeds=asked,
                   endpoint={"url": server.url, "retries": 0, "concurrency": 1})  # fmt: skip
    finally:
        server.gone_after = None
    server.asked.clear()
    made = distil(tmp_path / "out", server.url, seeds=asked)
    assert len(server.asked) == 2 and payload(made) == payload(whole)


def test_prompts_of_a_data_artifact_by_task_and_with_a_system_message(
    server: Watched, tmp_path: Path
) -> None:
    talks = [{"messages": TALK, "task": task} for task in ("chat", "arithmetic")]
    data = sign(
        tmp_path / "data", "data", lambda w: w.write_jsonl("conversations/train.jsonl", talks) and None
    )
    made = distil(tmp_path / "out", server.url, data=data.url, seeds="conversations/train.jsonl",
                  prompts={"tasks": ["arithmetic"], "system": "Be brief."})  # fmt: skip
    [chat] = chats(made)
    assert chat.task == "arithmetic" and chat.messages[0] == Message("system", "Be brief.")
    assert made.manifest["inputs"]["data"]["digest"] == data.digest


def test_pairs_have_a_task_and_what_is_not_asked_is_counted(server: Watched, tmp_path: Path) -> None:
    pair = {"chosen": "a", "rejected": "b", "task": "law"}
    rows = [ask("1"), {"prompt": "2", **pair}, ask("3", task="arithmetic"), {"prompt": "4", **pair}]
    words = seeds(tmp_path / "s.jsonl", rows)
    made = distil(tmp_path / "out", server.url, seeds=words, prompts={"tasks": ["law"]})
    assert [(c.task, c.messages[0].content) for c in chats(made)] == [("law", "2"), ("law", "4")]
    counts = made.json("counts.json")
    assert counts["asked"] == 4 and counts["dropped"] == {"other_task": 2}
    one = distil(tmp_path / "one", server.url, seeds=words, prompts={"tasks": ["law"]}, limit=1)
    assert [c.messages[0].content for c in chats(one)] == ["2"]


async def thoughtful(scope: Any, receive: Any, send: Any) -> None:
    """An endpoint as vLLM is with a reasoning parser and tools: it thinks, calls, or is cut."""
    message = await receive()
    body = json.loads(message["body"] or "{}")
    said: dict[str, Any] = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    reason = "stop"
    if body.get("tools"):
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"n": [2, 2]}'}}
        said, reason = {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
    elif body and body["messages"][-1]["content"] == "long":
        said["content"], reason = "cut", "length"
    elif body and body["messages"][-1]["content"] == "marks":
        said = {"role": "assistant", "content": "<think>\nby marks\n</think>\n\nyes"}
    elif body and "think>" in body["messages"][-1]["content"]:
        said = {"role": "assistant", "content": body["messages"][-1]["content"]}
    choice = {"index": 0, "message": said, "finish_reason": reason}
    answer = {"id": "x", "model": "teacher-v1", "choices": [choice], "data": [{"id": "teacher"}]}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def test_a_task_that_cannot_name_a_token_set_is_counted(server: Watched, tmp_path: Path) -> None:
    pair = {"prompt": "Who?", "chosen": "a", "rejected": "b"}
    rows = [ask("1", task="法律"), ask("2", task="documents"), ask("3", task="a b"), ask("4", task=5),
            {"instruction": "6", "output": "7", "task": "a/b"}, pair]  # fmt: skip
    made = distil(tmp_path / "out", server.url, seeds=seeds(tmp_path / "s.jsonl", rows))
    assert [c.task for c in chats(made)] == ["法律", "chat"]
    assert made.json("counts.json")["dropped"] == {"bad_task": 4}


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_and_calls_become_parts_of_the_message(tmp_path: Path, thinking: bool) -> None:
    rows = [ask("2 + 2?"), ask("2 + 2?", tools=[TOOL]), ask("long"), {"prompt": "marks"}]
    words = seeds(tmp_path / "s.jsonl", rows)
    with run_app(thoughtful) as (url, _):
        made = distil(tmp_path / "out", url, seeds=words, prompts={"thinking": thinking},
                      draw={**DRAW, "attempts": 1})  # fmt: skip
    assert made.json("counts.json")["dropped"] == {"cut_off": 1}
    assert made.manifest["metrics"]["teachers"] == {"teacher": 3}
    thought, marked = ("two and two", "by marks") if thinking else ("", "")
    assert [c.messages[-1] for c in chats(made)] == [
        Message("assistant", "4", thought),
        Message("assistant", "", tool_calls=(ToolCall("add", '{"n": [2, 2]}'),)),
        Message("assistant", "yes", marked),
    ]
    assert chats(made)[1].tools == (json.dumps(TOOL),)


def test_thinking_whose_marks_do_not_match_is_no_answer(tmp_path: Path) -> None:
    said = ["two and two</think>4", "<think>two and", "<think>a</think>b</think>4", "<think>a</think>4"]
    words = seeds(tmp_path / "s.jsonl", [ask(text) for text in said])
    with run_app(thoughtful) as (url, _):
        made = distil(tmp_path / "out", url, seeds=words, draw={**DRAW, "attempts": 1})
    assert made.json("counts.json")["dropped"] == {"unmatched_thinking": 3}
    assert [c.messages[-1] for c in chats(made)] == [Message("assistant", "4", "a")]


def test_calls_and_thinking_tell_two_prompts_apart(tmp_path: Path) -> None:
    def called(n: int, thought: str = "") -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "add", "arguments": {"n": n}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": thought}
        return {"messages": [*ask("+?")["messages"], answer, {"role": "tool", "content": "ok"}]}

    words = seeds(tmp_path / "s.jsonl", [called(1), called(2), called(2), called(2, "hm")])
    with run_app(thoughtful) as (url, _):
        made = distil(tmp_path / "out", url, seeds=words)
    assert made.json("counts.json")["dropped"] == {"duplicate_prompt": 1}
    calls = [[c.arguments for c in chat.messages[1].tool_calls] for chat in chats(made)]
    assert calls == [['{"n": 1}'], ['{"n": 2}'], ['{"n": 2}']]


def test_the_answers_are_what_is_learnt(server: Watched, model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", repeat=1)
    made = distil(tmp_path / "out", server.url, data=data.url, seeds="conversations/train.jsonl")
    tokenizer = sign(tmp_path / "model", "model", lambda work: write_tiny_model(work.path) and None)
    tokens = tokenize(TokenizeRecipe(out=str(tmp_path / "shards"), data=made.url, tokenizer=tokenizer.url))
    found = open_sets(tokens.path, "conversations-", "train")["chat"]
    labels = bytes(found.tokens[found.loss == 1].astype("u1"))
    engine = Engine(model, max_seqs=1)
    text = engine.tokenizer.decode(labels)
    assert text == "".join(c.messages[-1].content for c in chats(made)) and len(found.ends) == len(
        chats(made)
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"licence": ""}, "'prompts' needs 'licence'"),
        ({"count": 3, "seeds": None}, "leave 'templates' and 'count' out"),
        ({"seeds": None}, "'prompts' needs 'seeds'"),
        ({"endpoint": None}, "'prompts' needs 'seeds' .* and 'endpoint'"),
        ({"prompts": None}, "give 'templates' .* or 'prompts'"),
    ],
)
def test_a_recipe_that_asks_nothing_is_a_sentence(
    tmp_path: Path, fields: dict[str, Any], sentence: str
) -> None:
    values = {"out": str(tmp_path / "out"), "prompts": {}, "licence": "MIT", "seeds": "s.jsonl",
              "endpoint": {"url": "http://127.0.0.1:1"}}  # fmt: skip
    with pytest.raises(UserError, match=sentence):
        build(SynthRecipe, {k: v for k, v in (values | fields).items() if v is not None}, "test")
