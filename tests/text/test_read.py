"""Reading: shapes of records, the strict reader of our own files, and files in every packing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from microlm.core.errors import UserError
from microlm.core.records import (
    Conversation,
    Document,
    Extraction,
    Message,
    Preference,
    Question,
    Triple,
    to_json,
)
from microlm.text import sources
from microlm.text.read import Drop, read_records
from microlm.text.sources import Tally
from microlm.text.sources.shapes import parse_line

ASKED = (Message("user", "问"), Message("assistant", "答"))


@pytest.mark.parametrize(
    ("data", "record"),
    [
        ({"text": "文"}, Document("文", "f:1")),
        ({"text": "文", "source": "书", "license": "MIT"}, Document("文", "书", "MIT")),
        ({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, ASKED),
        ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}, ASKED),
        ({"instruction": "问", "input": "", "output": "答"}, ASKED),
        ({"instruction": "问", "output": "答"}, ASKED),
        ({"instruction": "问", "input": "甲", "output": "答"}, (Message("user", "问\n甲"), ASKED[1])),
        ({"prompt": "问", "chosen": "好", "rejected": "坏"}, Preference(ASKED[:1], "好", "坏", "f:1")),
        (
            {"conversations": [{"role": "user", "content": "问"}], "chosen": "好", "rejected": "坏"},
            Preference(ASKED[:1], "好", "坏", "f:1"),
        ),
        (
            {
                "text": "文",
                "relation": [{"head": "甲", "relation": "友", "tail": "乙"}],
                "id": 7,
                "cate": "人物",
            },
            Extraction("7", "人物", "文", (Triple("甲", "友", "乙"),), source="f:1"),
        ),
    ],
)
def test_shape_is_told_by_the_keys(data: dict[str, object], record: object) -> None:
    expected = Conversation(record, source="f:1") if isinstance(record, tuple) else record
    assert parse_line(json.dumps(data).encode(), "f:1") == expected


def test_unknown_role_is_named_with_the_known_ones() -> None:
    line = json.dumps({"messages": [{"role": "bot", "content": "x"}]}).encode()
    found = parse_line(line, "corpus.jsonl:812")
    assert found == Drop(
        "bad_role", "corpus.jsonl:812", "role 'bot' is not one of system, user, assistant, tool"
    )


@pytest.mark.parametrize(
    "record",
    [
        Document("文", "s", "MIT"),
        Conversation(ASKED, "reading", "s"),
        Preference(ASKED[:1], "好", "坏"),
        Extraction("1", "人物", "文", (Triple("甲", "友", "乙", "人", "人"),), ("友",), "mixed"),
        Question("1", "问？", "答", "generic"),
    ],
)
def test_written_records_read_back_equal(tmp_path: Path, record: object) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(to_json(record), ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_records(path, type(record))) == [record]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"source":"s"}', "key 'text' is missing"),
        ('{"text":1}', "expected str, found int"),
        ('{"text":"x","txet":"y"}', "unknown key 'txet'"),
        ("{", "not valid JSON"),
        ("", "the line is empty"),
    ],
)
def test_our_own_files_are_read_strictly(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"text":"x"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        list(read_records(path, Document))
    assert str(error.value).startswith(f"{path}:2: ")


def test_strict_reader_names_an_unknown_role(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"messages":[{"role":"bot","content":"x"}]}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"r.jsonl:1: 'bot' is not one of system, user, assistant, tool"):
        list(read_records(path, Conversation))


def packed(kind: str, data: bytes) -> bytes:
    if kind == "gz":
        return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])  # two members
    packer = zstandard.ZstdCompressor()
    if kind == "zst":
        return packer.compress(data[: len(data) // 2]) + packer.compress(data[len(data) // 2 :])  # two frames
    return data


@pytest.mark.parametrize("kind", ["", "gz", "zst"])
def test_a_packed_file_reads_as_the_plain_one(tmp_path: Path, kind: str) -> None:
    lines = [json.dumps({"text": f"第{i}篇" * (i % 50)}) for i in range(1, 3000)]
    path = tmp_path / "no-matter.jsonl"  # told by the bytes, not by the name
    path.write_bytes(packed(kind, b"\xef\xbb\xbf" + "\n".join(lines).encode()))
    went_by: list[int] = []
    source = sources.parse(f"jsonl:{path}")
    texts = [r.text for r in sources.read(source, Tally(), False, went_by.append) if isinstance(r, Document)]
    assert len(texts) == 2999 - 59
    assert sum(went_by) == path.stat().st_size


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_any_text_survives_the_reader(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8", newline="\n")
    read = [r for b in sources.blocks(sources.parse(f"jsonl:{path}")) for r in sources.read_block(b)]
    assert [r.text for r in read if isinstance(r, Document)] == [t for t in texts if t.strip()]


def test_a_folder_of_texts_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.md").write_text("# 二", encoding="utf-8")
    (tmp_path / "a.txt").write_text("一", encoding="utf-8")
    (tmp_path / "c.txt").write_bytes("三".encode("utf-16"))
    (tmp_path / "d.txt").write_bytes(b"")
    (tmp_path / "skipped.png").write_bytes(b"\x89PNG")
    read = [r for b in sources.blocks(sources.parse(f"text:{tmp_path}")) for r in sources.read_block(b)]
    assert read[:2] == [Document("一", "a.txt"), Document("# 二", "b/1.md")]
    assert [(r.reason, r.place) for r in read[2:] if isinstance(r, Drop)] == [
        ("unreadable_file", "c.txt"),
        ("unreadable_file", "d.txt"),
    ]


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("jsonl", "is not one of factbook, arithmetic:COUNT, jsonl:PATH"),
        ("jsnol:x.jsonl", "is not one of factbook, arithmetic:COUNT, jsonl:PATH"),
        ("factbook:x", "is not one of factbook, arithmetic:COUNT, jsonl:PATH"),
        ("jsonl:/none.jsonl", "no such file"),
        ("jsonl:s3://bucket/x.jsonl", "not on this machine"),
    ],
)
def test_a_wrong_source_word_is_a_sentence(word: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        sources.parse(word)


def test_a_changed_file_changes_the_fingerprint_and_its_place_does_not(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first, second = tmp_path / "x.jsonl", tmp_path / "a" / "x.jsonl"
    first.write_text('{"text":"x"}\n', encoding="utf-8")
    second.write_text('{"text":"x"}\n', encoding="utf-8")
    same = sources.parse(f"jsonl:{first}").fingerprint()
    assert same == sources.parse(f"jsonl:{second}").fingerprint()
    second.write_text('{"text":"y"}\n', encoding="utf-8")
    assert same != sources.parse(f"jsonl:{second}").fingerprint()
