"""Records on disk: without thinking, calls and tools they are the bytes they always were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from microlm.core.records import Conversation, Extraction, Message, Preference, ToolCall, Triple, to_json
from microlm.text.clean import tidied, tidy
from microlm.text.dedup import record_digest
from microlm.text.read import read_records, texts_of
from microlm.text.split import line_of

ASK, SAY = Message("user", "问"), Message("assistant", "答")
CALLED = Message("assistant", "", "想", (ToolCall("f", '{"x": "é"}'),))
PLAIN = {
    '{"messages":[{"role":"user","content":"问"},{"role":"assistant","content":"答"}],"task":"chat",'
    '"source":"f:1","licence":""}\n': Conversation((ASK, SAY), source="f:1"),
    '{"prompt":[{"role":"user","content":"问"}],"chosen":"好","rejected":"坏","source":"","licence":"MIT",'
    '"task":"chat"}\n': Preference((ASK,), "好", "坏", licence="MIT"),
    '{"id":"0","cate":"","text":"t","relation":[{"head":"a","relation":"b","tail":"c","head_type":"",'
    '"tail_type":""}],"allowed":[],"kind":"","lang":"zh","source":"","licence":""}\n':
    Extraction("0", "", "t", (Triple("a", "b", "c"),)),
}  # fmt: skip
FULL = [
    Conversation((ASK, CALLED, Message("tool", "4"), SAY), tools=('{"type": "function"}',)),
    Preference((ASK, CALLED, Message("tool", "4")), "好", "坏", tools=('{"type": "function"}',)),
]


@pytest.mark.parametrize("line", PLAIN)
def test_a_record_of_words_alone_is_written_as_before(line: str) -> None:
    assert line_of(PLAIN[line]) == line


@pytest.mark.parametrize("record", [*PLAIN.values(), *FULL], ids=lambda r: type(r).__name__)
def test_a_line_is_read_back_as_its_record(
    tmp_path: Path, record: Conversation | Preference | Extraction
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line_of(record) + json.dumps(to_json(record)) + "\n", encoding="utf-8")
    assert list(read_records(path, type(record))) == [record, record]


def test_what_is_said_in_fields_counts_as_said() -> None:
    chat = FULL[0]
    assert texts_of(chat) == ('{"type": "function"}', "问", "想", "", "f", '{"x": "é"}', "4", "答")
    assert isinstance(chat, Conversation)
    others = (
        Message("assistant", "", "念", CALLED.tool_calls),
        Message("assistant", "", "想", (ToolCall("g", '{"x": "é"}'),)),
        Message("assistant", "", "想", (ToolCall("f", '{"x": "e"}'),)),
    )
    chats = [chat, *(Conversation((ASK, m, *chat.messages[2:]), tools=chat.tools) for m in others)]
    chats.append(Conversation(chat.messages))
    assert len({record_digest(c) for c in chats}) == len(chats)


def test_cleaning_reaches_every_field() -> None:
    call = ToolCall("f", '{"x": "e\u0301\u200b"}')
    chat = Conversation(
        (ASK, Message("assistant", "答\u200b", "e\u0301", (call,))), tools=('{"a": "e\u0301"}',)
    )
    after = tidy(chat)
    assert after == Conversation(
        (ASK, Message("assistant", "答", "é", (ToolCall("f", '{"x": "é"}'),))), tools=('{"a": "é"}',)
    )
    assert tidied(chat) == (after, None)
    unseen = Conversation((ASK, Message("assistant", "答", "\u200b")))
    assert tidied(unseen)[1] == "nothing_visible"
