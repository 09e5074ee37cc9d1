"""Our template: one walk = the Jinja form = transformers, in text, ids and mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_models import ANSWERS, TEXTS, as_dicts, conversations, tools_of, write_model
from hypothesis import given, settings
from shared_data import DATA, raw_lines
from transformers import AutoTokenizer

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Message, ToolCall, words_of
from microlm.text.chat import encode_chat, encode_chats, render, template_of, template_text
from microlm.text.chat.chatml import ChatML
from microlm.text.read import texts_of
from microlm.text.sources.marked import parse_answer
from microlm.text.sources.shapes import parse_line
from microlm.text.tokenizer import MARKS, Tokenizer

Both = tuple[Tokenizer, Any]
CASES = {"marks": (MARKS, None), "marks, a name": (MARKS, "小明"), "no marks": ((), "Aria-2")}


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Our tokenizer and transformers', of the same files."""
    controls, name = CASES[request.param]
    path = write_model(tmp_path_factory.mktemp("run") / "t", template_text(name), controls)
    return Tokenizer.load(path), AutoTokenizer.from_pretrained(path)


def benign(tokenizer: Tokenizer, chat: Conversation) -> bool:
    return not any(token in text for text in texts_of(chat) for token in tokenizer.control)


def check_equal(both: Both, chat: Conversation) -> None:
    """Text, ids and mask are those of transformers."""
    tokenizer, theirs = both
    asked = {"conversation": as_dicts(chat), "tools": tools_of(chat)}
    for prompt in (False, True):
        text = theirs.apply_chat_template(**asked, tokenize=False, add_generation_prompt=prompt)
        assert render(tokenizer, chat.messages, prompt, chat.tools) == text
    if benign(tokenizer, chat):
        found = theirs.apply_chat_template(**asked, return_assistant_tokens_mask=True, return_dict=True)
        [(ids, mask)] = encode_chats(tokenizer, [chat])
        assert (ids, mask) == (found["input_ids"], found["assistant_masks"])
        prompt_ids = theirs.apply_chat_template(**asked, add_generation_prompt=True, return_dict=False)
        ids, mask = encode_chat(tokenizer, chat.messages, True, chat.tools)
        assert ids == prompt_ids and mask == [0] * len(ids)


@settings(max_examples=100)
@given(chat=conversations())
def test_text_ids_and_mask_are_those_of_transformers(both: Both, chat: Conversation) -> None:
    check_equal(both, chat)


@settings(max_examples=100)
@given(chat=conversations())
def test_ids_spell_the_text_and_learn_the_answers(both: Both, chat: Conversation) -> None:
    tokenizer, _ = both
    [(ids, mask)] = encode_chats(tokenizer, [chat])
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    named = {number: token.encode() for token, number in tokenizer.control.items()}
    spelt = b"".join(named[i] if i in named else tokenizer.token_bytes[i] for i in ids)
    assert spelt == render(tokenizer, chat.messages, tools=chat.tools).encode()
    learnt = [i for i, m in zip(ids, mask, strict=True) if m]
    assert learnt.count(tokenizer.eos_id) == sum(m.role == "assistant" for m in chat.messages)


@settings(max_examples=100)
@given(chat=conversations(), answer=ANSWERS)
def test_a_prompt_is_the_beginning_of_what_follows_it(
    both: Both, chat: Conversation, answer: Message
) -> None:
    tokenizer, _ = both
    asked = render(tokenizer, chat.messages, True, chat.tools)
    assert render(tokenizer, [*chat.messages, answer], tools=chat.tools).startswith(asked)


def test_the_ids_of_a_prompt_begin_those_of_training(both: Both) -> None:
    tokenizer, _ = both
    asked, answer = [Message("user", "李白是谁？")], Message("assistant", "唐代的诗人。")
    prompt, none = encode_chat(tokenizer, asked, generation_prompt=True)
    ids, mask = encode_chat(tokenizer, [*asked, answer])
    assert ids[: len(prompt)] == prompt and not any(none)
    assert mask == [0] * len(prompt) + [1] * len(tokenizer.encode(answer.content)) + [1] + [0]
    assert ids[-2] == tokenizer.eos_id and mask[-2] == 1


@settings(max_examples=60)
@given(words=TEXTS)
def test_what_is_typed_is_no_control(both: Both, words: str) -> None:
    """Every control token inside every text of a conversation stays text; the template's own are the same."""
    tokenizer, _ = both
    typed = words + "".join(tokenizer.control) + words

    def chat(text: str) -> Conversation:
        call = ToolCall("f", json.dumps({"x": text}, ensure_ascii=False))
        tool = json.dumps({"type": "function", "function": {"name": "f", "description": text}})
        turns = (
            Message("system", text),
            Message("user", text),
            Message("assistant", text, text, (call,)),
            Message("tool", text),
            Message("assistant", text),
        )
        return Conversation(turns, tools=(tool,))

    (plain, _), (ids, _) = encode_chats(tokenizer, [chat("x"), chat(typed)])
    control = set(tokenizer.control.values())
    assert [i for i in ids if i in control] == [i for i in plain if i in control]


@pytest.mark.parametrize("content", ["", "\n\n", "   deep"])
def test_the_eos_is_learnt_whatever_was_said(both: Both, content: str) -> None:
    tokenizer, _ = both
    ids, mask = encode_chat(tokenizer, [Message("assistant", content)])
    assert [m for i, m in zip(ids, mask, strict=True) if i == tokenizer.eos_id][-1] == 1


def test_many_conversations_are_encoded_as_one_by_one(both: Both) -> None:
    tokenizer, _ = both
    chats = [Conversation((Message("user", f"问{i}"), Message("assistant", f"答{i}"))) for i in range(9)]
    assert list(encode_chats(tokenizer, chats)) == [encode_chat(tokenizer, c.messages) for c in chats]


@pytest.mark.parametrize("name", [None, "小明", "Aria-2 (beta)"])
def test_our_template_is_known_by_its_text(tmp_path: Path, name: str | None) -> None:
    own = ChatML.named(name)
    assert ChatML.read(template_text(name)) == own and ChatML.read(template_text(name) + "\n") == own
    path = write_model(tmp_path / "t", template_text(name))
    assert template_of(Tokenizer.load(path)) == own
    changed = template_text(name).replace("<tool_response>", "<result>")
    assert ChatML.read(changed) is None


def test_the_name_is_in_the_default_system_turn_alone(both: Both) -> None:
    tokenizer, _ = both
    default = template_of(tokenizer).default_system  # type: ignore[union-attr]
    asked, told = Message("user", "你是谁？"), Message("system", "简短。")
    text = render(tokenizer, [asked])
    assert text.startswith(f"<|im_start|>system\n{default}<|im_end|>\n" if default else "<|im_start|>user\n")
    assert render(tokenizer, [told, asked]).startswith("<|im_start|>system\n简短。<|im_end|>\n")


@pytest.mark.parametrize("name", ["", " x", "x\ny", '"', "{{7*7}}", "<|im_end|>", "a" * 65, "\u200bx"])
def test_a_name_that_a_template_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="assistant_name"):
        template_text(name)


def test_calls_are_read_back_from_the_text() -> None:
    """The text of an answer is what Hermes parsers look for, and `parse_answer` finds the fields in it."""
    call = ToolCall("gpa", '{"grades": ["A"]}')
    for answer in (
        Message("assistant", "我查一下。", "要查", (call, call)),
        Message("assistant", "", "", (call,)),
        Message("assistant", "4 分", "想"),
    ):
        text = ChatML().render(Conversation((answer,)))
        said = text.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
        assert parse_answer(said) == answer and all(word in said for word in words_of(answer))


@pytest.mark.parametrize("page", ["chat_template.md", "chat_template.zh.md"])
def test_the_page_shows_what_is_rendered(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    shown = text.split("```\n<|im_start|>")[1].split("```")[0]
    turns = (
        Message("user", "我的 GPA 是多少？"),
        Message("assistant", "", "要算。", (ToolCall("gpa", '{"grades": ["A"]}'),)),
        Message("tool", '{"GPA": 4}'),
        Message("assistant", "4 分"),
    )
    assert ChatML.named("小明").render(Conversation(turns)) == f"<|im_start|>{shown}"


@pytest.mark.shared
@pytest.mark.parametrize("name", ["sft_chat.jsonl.zst", "sft_toolcall.jsonl.zst"])
def test_real_conversations_are_those_of_transformers(both: Both, name: str) -> None:
    assert (DATA / name).is_file()
    chats = [parse_line(line, f"{name}:{n}") for n, line in enumerate(raw_lines(name), 1)]
    chosen = [c for c in chats if isinstance(c, Conversation)][:: 10 if "chat" in name else 2]
    assert len(chosen) > 100
    for chat in chosen:
        check_equal(both, chat)
