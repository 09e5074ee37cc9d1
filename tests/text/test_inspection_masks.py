"""Cut answers and loss masks as the audit counts them, against ids that are walked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_models import write_model

from microlm.core.records import Conversation, Message, Preference, ToolCall
from microlm.text.chat import encode_chat, template_text
from microlm.text.inspection import masks
from microlm.text.tokenizer import SPECIAL, Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("run") / "t", template_text(None))


def chat(*turns: str) -> Conversation:
    roles: Any = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], words) for i, words in enumerate(turns)))


def test_an_answer_is_cut_when_its_end_is_beyond_the_context(folder: Path) -> None:
    chats = [
        chat("李白是谁？", "李白是唐代的诗人。"),
        chat("甲", "乙", "丙", "丁" * 10),
        chat("问" * 30, "答"),
    ]
    tokenizer = Tokenizer.load(folder)
    for context in range(1, 150):
        seen = list(masks.look(folder, context, chats))
        assert [(s.record, s.answers) for s in seen] == [(0, 1), (1, 2), (2, 1)]
        for one, conversation in zip(seen, chats, strict=True):
            ids, mask = encode_chat(tokenizer, conversation.messages)
            ends = [m for i, m in zip(ids[:context], mask, strict=False) if i == tokenizer.eos_id]
            assert (one.tokens, one.cut, one.fault) == (len(ids), one.answers - sum(ends), "")


def test_a_preference_is_two_answers(folder: Path) -> None:
    pair = Preference((Message("user", "问"),), "短", "很长的回答" * 20)
    assert [(s.record, s.answers, s.cut) for s in masks.look(folder, 30, [chat("一", "二"), pair])] == [
        (0, 1, 0), (1, 1, 0), (1, 1, 1)
    ]  # fmt: skip


def test_control_tokens_typed_by_a_user_are_no_fault(folder: Path) -> None:
    [seen] = masks.look(folder, 99, [chat("".join(SPECIAL), "<|im_end|>\n<|im_start|>user\n")])
    assert seen.fault == ""


def test_a_separator_that_is_no_special_token_stays_text_when_it_is_typed(
    folder: Path, tmp_path: Path
) -> None:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in data["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    faults = [s.fault for s in masks.look(tmp_path, 99, [chat("问", "答"), chat("说<|im_end|>了", "答")])]
    assert faults == ["", ""]


def test_thinking_calls_and_a_default_system_turn_are_no_fault(tmp_path: Path) -> None:
    path = write_model(tmp_path / "t", template_text("小明"))
    tool = '{"type": "function", "function": {"name": "f"}}'
    called = Message("assistant", "", "想", (ToolCall("f", "{}"),))
    turns = (Message("user", "问"), called, Message("tool", "4"), Message("assistant", "答"))
    pair = Preference(turns[:1], "<think>\n想\n</think>\n\n好", "坏", tools=(tool,))
    seen = list(masks.look(path, 9999, [Conversation(turns, tools=(tool,)), pair]))
    assert [(s.record, s.answers, s.cut, s.fault) for s in seen] == [
        (0, 2, 0, ""), (1, 1, 0, ""), (1, 1, 0, "")
    ]  # fmt: skip


def test_every_wrong_mask_has_a_name(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    turns = chat("问", "答").messages
    ids, mask = encode_chat(tokenizer, turns)
    assert masks.fault(tokenizer, turns, ids, mask) == ""
    assert masks.fault(tokenizer, turns, ids, mask[:-1]) == "mask_of_another_length"
    assert masks.fault(tokenizer, turns, ids, [0] * len(ids)) == "nothing_to_learn"
    last = max(i for i, token in enumerate(ids) if token == tokenizer.eos_id)
    first = ids.index(tokenizer.eos_id)
    assert (
        masks.fault(tokenizer, turns, ids, [*mask[:last], 0, *mask[last + 1 :]])
        == "eos_of_answer_not_labelled"
    )
    assert (
        masks.fault(tokenizer, turns, ids, [*mask[:first], 1, *mask[first + 1 :]]) == "label_outside_answers"
    )
    assert masks.fault(tokenizer, turns, ids, [*mask[:1], 1, *mask[2:]]) == "label_outside_answers"
    only_end = [int(i == last) for i in range(len(ids))]
    assert masks.fault(tokenizer, turns, ids, only_end) == "answer_not_labelled"
    assert masks.fault(tokenizer, turns[:1], ids, mask) == "control_token_from_text"
