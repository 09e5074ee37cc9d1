"""Foreign templates: text and ids of transformers, masks that are verified or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from chat_models import ANSWERS, TEXTS, TOOLS, as_dicts, conversations, tools_of, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import raw_lines
from transformers import AutoTokenizer

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Message, ToolCall
from microlm.text.chat import encode_chat, encode_chats, render, template_of
from microlm.text.chat.adopted import Adopted
from microlm.text.inspection import masks
from microlm.text.read import texts_of
from microlm.text.sources.shapes import parse_line
from microlm.text.tokenizer import MARKS, Tokenizer

TEMPLATES = Path(__file__).parent / "templates"
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CONTROLS = {"llama-3.1": LLAMA, "mistral": ("<s>",), "zephyr": ("<|user|>", "<|system|>", "<|assistant|>")}
BOS = {"llama-3.1": "<|begin_of_text|>", "mistral": "<s>"}
NAMES = sorted(path.stem for path in TEMPLATES.iterdir())
DATE = {"date_string": "26 Jul 2024"}
"""What our fixed clock says; transformers' clock is not fixed."""
ASK, SAY = Message("user", "李白是谁？"), Message("assistant", "诗人。")
SYSTEM = Message("system", "简短。")
TOOL = '{"type": "function", "function": {"name": "gpa", "parameters": {"type": "object"}}}'
CALL = Message("assistant", "", tool_calls=(ToolCall("gpa", '{"grades": ["A"]}'),))


def load(folder: Path, name: str, **fields: Any) -> Tokenizer:
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    controls = CONTROLS.get(name, MARKS)
    return Tokenizer.load(write_model(folder / name, template, controls, BOS.get(name), **fields))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Our tokenizer and transformers', of the same files, by template."""
    folder = tmp_path_factory.mktemp("models")
    ours = {name: load(folder, name) for name in NAMES}
    return {name: (own, AutoTokenizer.from_pretrained(own.path)) for name, own in ours.items()}


def theirs_or_error(theirs: Any, chat: Conversation, **fields: Any) -> Any:
    try:
        return theirs.apply_chat_template(as_dicts(chat), tools=tools_of(chat), **DATE, **fields)
    except (jinja2.TemplateError, TypeError) as error:
        return error


def check_equal(both: tuple[Tokenizer, Any], chat: Conversation) -> None:
    """Text and ids are those of transformers; what it cannot render, we refuse."""
    tokenizer, theirs = both
    if any(token in text for text in texts_of(chat) for token in tokenizer.control):
        return
    for prompt in (False, True):
        text = theirs_or_error(theirs, chat, tokenize=False, add_generation_prompt=prompt)
        if isinstance(text, Exception):
            with pytest.raises(UserError, match=r"chat template line [0-9]+: "):
                render(tokenizer, chat.messages, prompt, chat.tools)
            return
        assert render(tokenizer, chat.messages, prompt, chat.tools) == text
    ids = theirs_or_error(theirs, chat, add_generation_prompt=True, return_dict=False)
    assert encode_chat(tokenizer, chat.messages, True, chat.tools)[0] == ids


def alternating() -> st.SearchStrategy[Conversation]:
    """System perhaps, then user and assistant in turn: what every template renders."""
    system = st.lists(st.builds(Message, st.just("system"), TEXTS), max_size=1)
    pairs = st.lists(st.tuples(st.builds(Message, st.just("user"), TEXTS), ANSWERS), min_size=1, max_size=3)
    turns = st.builds(lambda head, said: (*head, *(m for pair in said for m in pair)), system, pairs)
    return st.builds(Conversation, turns, tools=TOOLS)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(chat=alternating() | conversations())
def test_text_and_ids_are_those_of_transformers(models: Any, name: str, chat: Conversation) -> None:
    check_equal(models[name], chat)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_real_tool_calls_are_those_of_transformers(models: Any, name: str) -> None:
    chats = [parse_line(line, "f:1") for line in raw_lines("sft_toolcall.jsonl.zst")][::7]
    for chat in chats:
        assert isinstance(chat, Conversation)
        check_equal(models[name], chat)


def learnt(tokenizer: Tokenizer, chat: Conversation) -> list[str]:
    """The text of each stretch of labels."""
    [(ids, mask)] = encode_chats(tokenizer, [chat])
    named = {number: token.encode() for token, number in tokenizer.control.items()}
    found, before = [], 0
    for token, learn in zip(ids, mask, strict=True):
        if learn and not before:
            found.append(b"")
        if learn:
            found[-1] += named[token] if token in named else tokenizer.token_bytes[token]
        before = learn
    return [text.decode() for text in found]


LEARNT = {
    "llama-3.1": "<|eot_id|>",
    "marked": "<|im_end|>",
    "mistral": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "smollm2": "<|im_end|>",
    "zephyr": "<|im_end|>",
}


@pytest.mark.parametrize("name", LEARNT)
def test_answers_with_their_end_are_learnt_and_nothing_else(models: Any, name: str) -> None:
    tokenizer, _ = models[name]
    end = LEARNT[name]
    assert isinstance(template_of(tokenizer), Adopted)
    longer = Message("assistant", "唐代的诗人 \u00e9👩🏽‍🚀")
    chat = Conversation((ASK, SAY, ASK, longer))
    assert learnt(tokenizer, chat) == [f"诗人。{end}", f"{longer.content}{end}"]


def test_calls_are_learnt(models: Any) -> None:
    chat = Conversation((SYSTEM, ASK, CALL, Message("tool", "4"), SAY), tools=(TOOL,))
    call = '<tool_call>\n{"name": "gpa", "arguments": {"grades": ["A"]}}\n</tool_call><|im_end|>'
    assert learnt(models["qwen2.5"][0], chat) == [call, "诗人。<|im_end|>"]
    call = '{"name": "gpa", "parameters": {"grades": ["A"]}}<|eot_id|>'
    llama = Conversation((ASK, CALL, Message("tool", "4"), SAY))
    assert learnt(models["llama-3.1"][0], llama) == [call, "诗人。<|eot_id|>"]


@settings(max_examples=40)
@given(chat=alternating())
def test_generation_marks_give_the_mask_of_transformers(models: Any, chat: Conversation) -> None:
    tokenizer, theirs = models["marked"]
    if any(token in text for text in texts_of(chat) for token in tokenizer.control):
        return
    found = theirs.apply_chat_template(as_dicts(chat), return_assistant_tokens_mask=True, return_dict=True)
    assert next(encode_chats(tokenizer, [chat])) == (found["input_ids"], found["assistant_masks"])


def test_marks_without_the_closing_token_still_teach_to_stop(tmp_path: Path) -> None:
    marked = (TEMPLATES / "marked.jinja").read_text(encoding="utf-8")
    outside = marked.replace(
        " + '<|im_end|>' }}\n        {%- endgeneration %}", " }}{%- endgeneration %}{{- '<|im_end|>' }}"
    )
    unclosed = marked.replace("trim + '<|im_end|>'", "trim")
    nowhere = marked.replace("message.role == 'assistant'", "message.role == 'nobody'")
    assert len({marked, outside, unclosed, nowhere}) == 4
    chat = Conversation((ASK, SAY, ASK, SAY))
    found = {}
    for name, template in (("outside", outside), ("unclosed", unclosed), ("nowhere", nowhere)):
        found[name] = Tokenizer.load(write_model(tmp_path / name, template, MARKS, None))
    assert learnt(found["outside"], chat) == ["诗人。<|im_end|>"] * 2
    for name in ("unclosed", "nowhere"):
        with pytest.raises(
            UserError, match="marks show 0 answers that a control token ends, the conversation has 2"
        ):
            encode_chat(found[name], chat.messages)


def test_qwen3_learns_one_answer_and_refuses_two(models: Any) -> None:
    """It drops earlier thinking: an answer is written otherwise when another turn follows it."""
    tokenizer, _ = models["qwen3"]
    thoughtful = Message("assistant", "诗人。", "想")
    assert learnt(tokenizer, Conversation((ASK, thoughtful))) == ["<think>\n想\n</think>\n\n诗人。<|im_end|>"]
    with pytest.raises(UserError) as refusal:
        encode_chat(tokenizer, [ASK, thoughtful, ASK, SAY])
    said = str(refusal.value)
    assert "no loss mask for message 2 (assistant)" in said and "{% generation %}" in said
    assert "<think>" in said and "in the whole conversation" in said
    with pytest.raises(UserError, match=r"^my\.jsonl:7: .*no loss mask for message 2"):
        list(encode_chats(tokenizer, [Conversation((ASK, thoughtful, ASK, SAY), source="my.jsonl:7")]))
    prompt, mask = encode_chat(tokenizer, [ASK, thoughtful, ASK], generation_prompt=True)
    assert prompt[-1] != tokenizer.eos_id and not any(mask)


@pytest.mark.parametrize(
    ("name", "turns", "reason"),
    [
        ("qwen2.5", (ASK, Message("assistant", "诗人。", "想")), "the template leaves out '想'"),
        ("mistral", (SAY,), "roles must alternate"),
        ("zephyr", (ASK, CALL), "the template leaves out 'gpa'"),
    ],
)
def test_a_mask_that_cannot_be_told_is_refused(
    models: Any, name: str, turns: tuple[Message, ...], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        list(encode_chats(models[name][0], [Conversation(turns)]))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}", "no control token ends it"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}<|im_end|> (end){% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}", "no control token ends it"),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
         "{% if add_generation_prompt %}A:{% endif %}", "the prompt for it"),
        ("{% if messages | length < 2 %}{{ raise_exception('too few') }}{% endif %}", "cannot be rendered"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "the prompt"),
        ("{% macro said(m) %}A: {% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
         "{% for m in messages %}x{{ said(m) }}{% endfor %}", "inside a macro"),
    ],
)  # fmt: skip
def test_templates_without_a_mask(tmp_path: Path, template: str, reason: str) -> None:
    tokenizer = Tokenizer.load(write_model(tmp_path / "t", template))
    with pytest.raises(UserError, match=reason):
        encode_chat(tokenizer, [ASK, SAY])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(words=TEXTS)
def test_what_is_typed_is_no_control(models: Any, name: str, words: str) -> None:
    tokenizer, _ = models[name]
    typed = words + "".join(tokenizer.control) + words

    def control(text: str) -> list[int]:
        ids, _ = encode_chat(tokenizer, [Message("user", text), Message("assistant", text)])
        return [i for i in ids if i in tokenizer.control.values()]

    assert control("x" + typed) == control("xy")
    assert typed in render(tokenizer, [Message("user", f"x{typed}x")])


def test_private_characters_of_a_conversation_stay_what_they_are(models: Any) -> None:
    tokenizer, _ = models["qwen2.5"]
    typed = f"{chr(0xF0000)}<|im_end|>{chr(0xF0001)}</think>{chr(0xF0004)}"
    assert typed in render(tokenizer, [Message("user", typed)])


def test_a_normalizer_keeps_the_mask(tmp_path: Path) -> None:
    """Qwen's tokenizers compose characters: then ids spell the composed text."""
    tokenizer = load(tmp_path, "qwen2.5", nfc=True)
    chat = Conversation((Message("user", "e\u0301"), Message("assistant", "e\u0301a"), ASK, SAY))
    assert learnt(tokenizer, chat) == ["\u00e9a<|im_end|>", "诗人。<|im_end|>"]


def test_control_tokens_that_swallow_blanks_keep_the_mask(tmp_path: Path) -> None:
    path = load(tmp_path, "qwen2.5").path
    data = json.loads((path / "tokenizer.json").read_bytes())
    for token in data["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_end|>"
    (path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    tokenizer, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    chat = Conversation((ASK, SAY, ASK, SAY))
    ids, _ = next(encode_chats(tokenizer, [chat]))
    assert ids == theirs.apply_chat_template(as_dicts(chat), return_dict=False)
    assert learnt(tokenizer, chat) == ["诗人。<|im_end|>"] * 2


def test_the_template_for_tools_is_taken_where_there_are_tools(tmp_path: Path) -> None:
    path = write_model(tmp_path / "t", "")
    (path / "chat_template.jinja").unlink()
    config = json.loads((path / "tokenizer_config.json").read_bytes())
    text = "{% for m in messages %}NAME{{ m.content }}{% endfor %}"
    names = ("default", "tool_use")
    config["chat_template"] = [{"name": n, "template": text.replace("NAME", n)} for n in names]
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    for tools in ((), (TOOL,)):
        chat = Conversation((ASK,), tools=tools)
        text = theirs.apply_chat_template(as_dicts(chat), tools=tools_of(chat), tokenize=False)
        assert render(tokenizer, [ASK], tools=tools) == text


def test_the_audit_names_what_a_template_refuses(models: Any) -> None:
    tokenizer, _ = models["qwen3"]
    one, two = Conversation((ASK, SAY)), Conversation((ASK, SAY, ASK, SAY))
    seen = list(masks.look(tokenizer.path, 99, [one, two]))
    assert [(s.answers, s.cut, s.fault) for s in seen] == [(1, 0, ""), (0, 0, "refused_by_template")]


CASES = {
    "one answer": (ASK, SAY),
    "several answers": (ASK, SAY, ASK, SAY),
    "thinking": (ASK, Message("assistant", "诗人。", "想")),
    "tool calls": (ASK, CALL),
}
ROWS = {
    "Qwen2.5": ["qwen2.5"],
    "Qwen3": ["qwen3"],
    "SmolLM2, Zephyr, Mistral": ["smollm2", "zephyr", "mistral"],
    "Llama 3.1": ["llama-3.1"],
}


@pytest.mark.parametrize("language", ["chat_template.md", "chat_template.zh.md"])
@pytest.mark.parametrize("row", ROWS)
def test_the_page_says_what_can_be_learnt(models: Any, row: str, language: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / language).read_text(encoding="utf-8")
    [line] = [line for line in text.splitlines() if line.startswith(f"| {row.replace(', ', '、')} |")
              or line.startswith(f"| {row} |")]  # fmt: skip
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    for cell, (case, turns) in zip(cells, CASES.items(), strict=True):
        assert cell.startswith(("yes", "refused", "可以", "拒绝"))
        for name in ROWS[row]:
            try:
                found = bool(learnt(models[name][0], Conversation(turns)))
            except UserError:
                found = False
            assert found == cell.startswith(("yes", "可以")), (name, case)
