"""Formats of conversations and preference pairs: each becomes the messages that a person would write down."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.core.records import Conversation, Document, Message, Preference, ToolCall
from microlm.text.read import Drop
from microlm.text.sources.marked import answer_text, parse_answer, tool_call
from microlm.text.sources.shapes import parse_line, shape_of

SYSTEM, ASK, SAY = Message("system", "简短回答。"), Message("user", "问"), Message("assistant", "答")
TOOLS = [{"name": "gpa", "parameters": {}}]
CALL = {"name": "gpa", "arguments": {"grades": ["A"]}}
GPA = ToolCall("gpa", '{"grades": ["A"]}')
CALLED = Message("assistant", "", tool_calls=(GPA,))
RESULT, TOLD = Message("tool", '{"GPA": 4}'), Message("assistant", "4 分")
THOUGHTFUL = Message("assistant", "4 分", "查到了")
TOOL = '{"type": "function", "function": {"name": "gpa", "parameters": {}}}'
CHATML_TOOLS = f"""<|im_start|>system
简短回答。

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{TOOL}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call><|im_end|>
<|im_start|>user
问<|im_end|>
<|im_start|>assistant
<tool_call>
{{"name": "gpa", "arguments": {{"grades": ["A"]}}}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
{{"GPA": 4}}
</tool_response><|im_end|>
<|im_start|>assistant
<think>
查到了
</think>

4 分<|im_end|>
"""  # noqa: E501


def openai(*messages: Message) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def sharegpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": word, "value": value} for word, value in turns]


def record(data: dict[str, Any]) -> object:
    return parse_line(json.dumps(data).encode(), "f:1")


CONVERSATIONS: dict[str, tuple[str, dict[str, Any], list[Message]]] = {
    "Alpaca with history": (
        "Alpaca instructions",
        {
            "instruction": "三",
            "output": "叁",
            "history": [["一", "壹"], ["二", "贰"]],
            "system": "简短回答。",
        },
        [
            SYSTEM,
            *(
                Message(role, word)  # type: ignore[arg-type]
                for role, word in zip(["user", "assistant"] * 3, "一壹二贰三叁", strict=True)
            ),
        ],
    ),
    "OpenAI": ("OpenAI messages", {"messages": openai(SYSTEM, ASK, SAY)}, [SYSTEM, ASK, SAY]),
    "OpenAI, parts": (
        "OpenAI messages",
        {
            "messages": [
                {"role": "developer", "content": "简短回答。"},
                {"role": "user", "content": [{"type": "text", "text": "问"}]},
                *openai(SAY),
            ]
        },
        [SYSTEM, ASK, SAY],
    ),
    "OpenAI, tools": (
        "OpenAI messages",
        {
            "tools": TOOLS,
            "messages": [
                *openai(SYSTEM, ASK),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"type": "function", "function": {"name": "gpa", "arguments": '{"grades": ["A"]}'}}
                    ],
                },
                *openai(RESULT, TOLD),
            ],
        },
        [SYSTEM, ASK, CALLED, RESULT, TOLD],
    ),
    "ShareGPT": (
        "ShareGPT conversations",
        {"conversations": sharegpt(("system", "简短回答。"), ("human", "问"), ("gpt", "答"))},
        [SYSTEM, ASK, SAY],
    ),
    "ShareGPT, tools": (
        "ShareGPT conversations",
        {
            "tools": json.dumps(TOOLS),
            "conversations": sharegpt(
                ("human", "问"),
                ("function_call", json.dumps(CALL)),
                ("observation", '{"GPA": 4}'),
                ("gpt", "4 分"),
            ),
        },
        [ASK, CALLED, RESULT, TOLD],
    ),
    "ChatML": (
        "ChatML text",
        {
            "text": "<|im_start|>system\n简短回答。<|im_end|>\n<|im_start|>user\n问<|im_end|>\n"
            "<|im_start|>assistant\n答<|im_end|>\n"
        },
        [SYSTEM, ASK, SAY],
    ),
    "minimind": ("minimind conversations", {"conversations": openai(ASK, SAY)}, [ASK, SAY]),
    "minimind, tools and thought": (
        "minimind conversations",
        {
            "conversations": [
                {"role": "system", "content": "简短回答。", "tools": json.dumps(TOOLS)},
                *openai(ASK),
                {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
                *openai(RESULT),
                {"role": "assistant", "content": "4 分", "reasoning_content": "查到了"},
            ]
        },
        [
            SYSTEM,
            ASK,
            CALLED,
            RESULT,
            THOUGHTFUL,
        ],
    ),
    "minimind, tools alone in the system turn": (
        "minimind conversations",
        {"conversations": [{"role": "system", "content": "", "tools": json.dumps(TOOLS)}, *openai(ASK, SAY)]},
        [ASK, SAY],
    ),
    "ChatML, tools and thought": (
        "ChatML text",
        {"text": CHATML_TOOLS},
        [SYSTEM, ASK, CALLED, RESULT, THOUGHTFUL],
    ),
    "ShareGPT, marks in the words": (
        "ShareGPT conversations",
        {
            "tools": [TOOL],
            "conversations": sharegpt(
                ("human", "问"),
                (
                    "gpt",
                    "<think>查</think>\n<tool_call>\n"
                    + json.dumps(CALL)
                    + "\n</tool_call>\n<tool_call>"
                    + json.dumps(CALL)
                    + "</tool_call>",
                ),
                ("tool", '<tool_response>\n{"GPA": 4}\n</tool_response>'),
                ("gpt", "4 分"),
            ),
        },
        [ASK, Message("assistant", "", "查", (GPA, GPA)), RESULT, TOLD],
    ),
    "OpenAI, the older single call": (
        "OpenAI messages",
        {
            "tools": [{"type": "function", "function": TOOLS[0]}],
            "messages": [
                *openai(ASK),
                {"role": "assistant", "content": "我查。", "reasoning": "要查", "function_call": CALL},
                {"role": "function", "name": "gpa", "content": '{"GPA": 4}'},
                *openai(TOLD),
            ],
        },
        [ASK, Message("assistant", "我查。", "要查", (GPA,)), RESULT, TOLD],
    ),
    "turns as a JSON text": (
        "OpenAI messages",
        {"messages": json.dumps(openai(ASK, SAY)), "text": None},
        [ASK, SAY],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_in_anyones_words_is_its_messages(name: str) -> None:
    shape, data, messages = CONVERSATIONS[name]
    tools = (TOOL,) if "tools" in name or "marks" in name or "single call" in name else ()
    assert shape_of(data) == shape
    assert record(data) == Conversation(tuple(messages), source="f:1", tools=tools)


PAIR = Preference((ASK,), "好", "坏", "f:1")
GOOD, BAD = openai(Message("assistant", "好")), openai(Message("assistant", "坏"))


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"prompt": openai(ASK), "chosen": GOOD, "rejected": BAD},
        {"prompt": "问", "chosen": [*openai(ASK), *GOOD], "rejected": [*openai(ASK), *BAD]},
        {"chosen": [*openai(ASK), *GOOD], "rejected": [*openai(ASK), *BAD]},
        {"conversations": openai(ASK), "chosen": "好", "rejected": "坏"},
        {
            "conversations": sharegpt(("human", "问")),
            "chosen": {"from": "gpt", "value": "好"},
            "rejected": {"from": "gpt", "value": "坏"},
        },
        {"prompt": json.dumps(openai(ASK)), "chosen": json.dumps(GOOD), "rejected": json.dumps(BAD)},
        {"prompt": "问", "chosen": "好", "rejected": "坏", "messages": None},
    ],
)
def test_a_preference_in_anyones_words_is_one_pair(data: dict[str, Any]) -> None:
    assert record(data) == PAIR


def test_an_answer_that_is_json_stays_an_answer() -> None:
    answers = {"chosen": '[{"name": "李白"}]', "rejected": '[{"name": "杜甫"}]'}
    assert record({"prompt": "问", **answers}) == Preference((ASK,), *answers.values(), "f:1")


def test_a_preference_keeps_thinking_calls_and_tools() -> None:
    chosen = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "想",
        "tool_calls": [{"function": {"name": "gpa", "arguments": '{"grades": ["A"]}'}}],
    }
    found = record({"prompt": "问", "chosen": chosen, "rejected": "坏", "tools": TOOLS})
    assert isinstance(found, Preference)
    assert found.tools == (TOOL,) and parse_answer(found.chosen) == Message("assistant", "", "想", (GPA,))


@pytest.mark.parametrize(
    "words",
    [
        "标记 <think> 和 </think> 在文中",
        "先 <tool_call>{}</tool_call> 后文",
        '<tool_call>{"name": "gpa"}</tool_call> 后文',
        "<tool_call>不是 JSON</tool_call>",
        "<think>没有结束",
        "</think>",
    ],
)
def test_marks_that_are_part_of_the_words_stay_words(words: str) -> None:
    assert parse_answer(words) == Message("assistant", words)


@settings(max_examples=200)
@given(
    st.text(),
    st.text(min_size=1).filter(lambda t: t.strip() and "</think>" not in t),
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text())),
    st.integers(0, 3),
)
def test_an_answer_is_read_back_from_its_text(
    content: str, reasoning: str, arguments: dict[str, Any], calls: int
) -> None:
    called = (tool_call("gpa", arguments),) * calls
    for message in (
        Message("assistant", content, reasoning, called),
        Message("assistant", content, "", called),
    ):
        if "<" not in content:
            assert parse_answer(answer_text(message)) == message


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "问"}, *messages]}


DROPPED: dict[str, tuple[dict[str, Any], str]] = {
    "a picture": (turns({"role": "user", "content": [{"type": "image_url"}]}), "not_only_text"),
    "a call without a name": (
        turns({"role": "assistant", "tool_calls": [{"function": {}}]}),
        "bad_tool_call",
    ),
    "a surrogate in a call": (
        turns({"role": "assistant", "tool_calls": [{"name": "f", "arguments": '"\\ud800"'}]}),
        "lone_surrogate",
    ),
    "arguments that are no object": (
        turns({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}),
        "bad_tool_call",
    ),
    "a call that is no JSON": (
        {"conversations": sharegpt(("human", "问"), ("function_call", "{'name': 'f'}"), ("gpt", "答"))},
        "bad_tool_call",
    ),
    "tools that are no JSON": ({"tools": "use gpa()", "messages": openai(ASK, SAY)}, "bad_tools"),
    "a tool without a name": ({"tools": [{"type": "function"}], "messages": openai(ASK, SAY)}, "bad_tools"),
    "thinking and no answer": (
        turns({"role": "assistant", "content": "<think>\n想\n</think>\n\n"}),
        "content_empty",
    ),
    "history without answers": (
        {"instruction": "x", "output": "y", "history": ["一", "二"]},
        "bad_history",
    ),
    "ChatML without an end": (
        {"text": "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n"},
        "bad_chatml",
    ),
    "ChatML with words between": (
        {"text": "<|im_start|>user\n问<|im_end|>\n旁白<|im_start|>assistant\n答<|im_end|>"},
        "bad_chatml",
    ),
    "ChatML, unknown role": ({"text": "<|im_start|>bot\n答<|im_end|>"}, "bad_role"),
    "two prompts": (
        {"chosen": [*openai(ASK), *GOOD], "rejected": [*openai(SYSTEM, ASK), *BAD]},
        "prompts_differ",
    ),
    "a pair that ends with the user": (
        {"prompt": "x", "chosen": openai(ASK), "rejected": openai(ASK)},
        "no_answer",
    ),
    "an answered prompt": ({"prompt": openai(ASK, SAY), "chosen": "x", "rejected": "y"}, "no_question"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_cannot_be_a_conversation_is_a_drop_with_a_reason(name: str) -> None:
    data, reason = DROPPED[name]
    found = record(data)
    assert isinstance(found, Drop) and found.reason == reason


def test_markers_without_roles_hold_plain_text() -> None:
    text = "<|im_start|>鉴别文章的风格\n和特点。<|im_end|> <|im_start|>第二篇。<|im_end|>"
    assert record({"text": text}) == Document("鉴别文章的风格\n和特点。\n第二篇。", "f:1")
    assert record({"text": "标记 <|im_start|>user\n 在文中"}) == Document(
        "标记 <|im_start|>user\n 在文中", "f:1"
    )


def test_deep_json_with_an_escape_is_no_traceback() -> None:
    deep = '{"text": "\\ud83d\\ude00", "x": ' + "[" * 600 + "]" * 600 + "}"
    assert parse_line(deep.encode(), "f:1") == Document("😀", "f:1")
