"""Every kind of broken corpus is a one-sentence UserError or a counted drop; nothing is lost uncounted."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.core.errors import UserError
from microlm.core.records import Document
from microlm.text import sources
from microlm.text.read import Drop
from microlm.text.sources import MAX_REASONS, Tally, packed
from microlm.text.sources.shapes import parse_line

GOOD = [json.dumps({"text": f"第{i}篇文章说的是诗人。"}, ensure_ascii=False).encode() for i in range(9)]


def read(path: Path, strict: bool = False, kind: str = "jsonl") -> tuple[list[object], Tally]:
    tally = Tally()
    records: list[object] = list(sources.read(sources.parse(f"{kind}:{path}"), tally, strict))
    return records, tally


def message(role: object = "user", content: object = "x") -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content}]}).encode()


DROPPED = {
    "invalid_utf8": b'{"text": "\xe6\xff"}',
    "surrogates_as_bytes:invalid_utf8": b'{"text": "\xed\xa0\x80"}',
    "lone_surrogate": b'{"text": "a\\ud800b"}',
    "capital_escape:lone_surrogate": b'{"text": "a\\uDC00b"}',
    "key:lone_surrogate": b'{"text": "a", "\\ud800": 1}',
    "nul_byte": b'{"text": "a\x00b"}',
    "empty_line": b"",
    "blanks:empty_line": b"  \t ",
    "truncated:invalid_json": b'{"text": "a',
    "single_quotes:invalid_json": b"{'text': 'a'}",
    "two_objects:invalid_json": b'{"text": "a"}{"text": "b"}',
    "raw_tab:invalid_json": b'{"text": "a\tb"}',
    "deep:invalid_json": b"[" * 100_000,
    "long_number:invalid_json": b'{"text": ' + b"9" * 5000 + b"}",
    "list:not_an_object": b'["text"]',
    "string:not_an_object": b'"text"',
    "missing_field:text (found body)": b'{"body": "a"}',
    "no_keys:missing_field:text (found no keys)": b"{}",
    "text_null": b'{"text": null}',
    "text_not_a_string": b'{"text": 7}',
    "text_empty": b'{"text": " \\n\\u3000"}',
    "bad_role": message("bot"),
    "no_role:bad_role": message(None),
    "content_not_a_string": message("user", ["x"]),
    "content_null": message("user", None),
    "content_empty": message("user", ""),
    "no_content:missing_field:content (found role)": b'{"messages": [{"role": "user"}]}',
    "no_list:bad_messages": b'{"messages": "x"}',
    "no_turns:bad_messages": b'{"messages": []}',
    "no_object:bad_messages": b'{"messages": ["x"]}',
    "no_answer": message("user"),
    "missing_field:output (found instruction)": b'{"instruction": "x"}',
    "input_not_a_string": b'{"instruction": "x", "input": [1], "output": "y"}',
    "missing_field:rejected (found prompt, chosen)": b'{"prompt": "x", "chosen": "y"}',
    "missing_field:prompt": b'{"chosen": "x", "rejected": "y"}',
    "relation:bad_relation": b'{"text": "x", "relation": "y"}',
    "triple:bad_relation": b'{"text": "x", "relation": ["y"]}',
    "missing_field:tail (found head, relation)": b'{"text":"x","relation":[{"head":"a","relation":"b"}]}',
}


def reason_of(name: str) -> str:
    first, _, rest = name.partition(":")
    return name if first == "missing_field" or not rest else rest


@pytest.mark.parametrize("name", DROPPED)
def test_a_broken_line_is_a_counted_drop(tmp_path: Path, name: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join([*GOOD[:4], DROPPED[name], *GOOD[4:]]) + b"\n")
    records, tally = read(path)
    assert len(records) == tally.kept == 9
    assert tally.dropped == {reason_of(name): 1}
    assert tally.read == tally.kept + tally.dropped.total() == 10
    assert tally.examples[reason_of(name)][0].startswith("corpus.jsonl:5: ")


@pytest.mark.parametrize("name", DROPPED)
def test_in_strict_mode_it_is_an_error_with_file_and_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join([*GOOD[:4], DROPPED[name], *GOOD[4:]]) + b"\n")
    with pytest.raises(UserError, match=r"corpus\.jsonl:5: ") as error:
        read(path, strict=True)
    assert "\n" not in str(error.value)


def gz_half(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)[: len(gzip.compress(data, mtime=0)) // 2]


def zst_half(data: bytes) -> bytes:
    return zstandard.compress(data)[: len(zstandard.compress(data)) // 2]


def flipped(data: bytes) -> bytes:
    packed = bytearray(gzip.compress(data, mtime=0))
    packed[len(packed) // 2] ^= 0x55
    return bytes(packed)


MANY = b"\n".join(json.dumps({"text": f"{i * 7919 % 10007} 篇文章"}).encode() for i in range(12_000)) + b"\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (gz_half(MANY), "truncated_file"),
        (gzip.compress(MANY, mtime=0)[:-3], "truncated_file"),
        (flipped(MANY), "damaged_file"),
        (gzip.compress(MANY, mtime=0) + b"rest", "damaged_file"),
        (zst_half(MANY), "truncated_file"),
    ],
)
def test_what_stands_before_a_break_is_kept_and_the_break_is_one_drop(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(data)
    records, tally = read(path)
    whole = [Document(json.loads(line)["text"]).text for line in MANY.splitlines()]
    texts = [r.text for r in records if isinstance(r, Document)]
    assert 0 < len(texts) == tally.kept and texts[:50] == whole[:50]
    assert tally.dropped[reason] == 1
    if reason == "truncated_file":
        assert texts == whole[: len(texts)] and tally.dropped.total() == 1
    assert tally.read == tally.kept + tally.dropped.total()
    with pytest.raises(UserError, match=r"corpus\.jsonl\.gz:"):
        read(path, strict=True)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("c.jsonl", b"", "holds no records"),
        ("c.jsonl.gz", gzip.compress(b"", mtime=0), "holds no records"),
        ("c.jsonl", "文".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("c.jsonl", '{"text":"x"}\n'.encode("utf-16-be"), "binary"),
        ("c.jsonl", bytes(range(256)) * 20, "looks like a binary file"),
        ("c.jsonl", b"PK\x03\x04rest", "is a zip archive; unpack it"),
        ("c.jsonl", b"PAR1rest", "is a Parquet file"),
        ("c.jsonl.zst", b"BZh9rest", "is bzip2"),
        ("c.csv", b"text\nx\n", r"'.csv' is not one of .jsonl"),
        ("corpus", b'{"text":"x"}\n', "'no extension' is not one of"),
        ("c.json", b'[{"text":"x"},\n{"text":"y"}]\n', "is not one JSON object a line"),
        ("c.json", b'{\n "text": "x"\n}\n', "is not one JSON object a line"),
        ("c.jsonl", b'{"body":"x"}\n' * 3, r"3 of 3 records cannot be used, most often missing_field:text"),
        ("c.jsonl", b'{"text":"x"}\n' + b"{}\n" * 2, "2 of 3 records cannot be used"),
        ("c.jsonl", b"\n\n\n", "3 of 3 records cannot be used, most often empty_line"),
        ("c.txt", b"x", r"'.txt' is not one of .jsonl"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        read(path)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_missing_file_is_one_sentence(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="no such file; check the path"):
        read(tmp_path / "none.jsonl", kind=kind)


def test_a_folder_without_such_a_file_is_one_sentence(tmp_path: Path) -> None:
    for kind, words in (
        ("jsonl", r"\.jsonl"),
        ("text", r"\.txt"),
        ("csv", r"\.csv"),
        ("parquet", r"\.parquet"),
    ):
        with pytest.raises(UserError, match=f"holds no {words}.* file; check the folder"):
            read(tmp_path, kind=kind)


@pytest.mark.parametrize("data", [b"a\x00b" + b"x" * 99, b"\xff\x80" + b"x" * 99, b" \n "])
def test_a_broken_text_file_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"1 of 1 records cannot be used"):
        read(path, kind="text")


def test_byte_order_marks_and_windows_line_ends_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\xef\xbb\xbf".join(GOOD) + b"\r\n")
    records, tally = read(path)
    assert (tally.read, tally.kept, len(records)) == (9, 9, 9)


def test_a_field_renamed_half_way_is_counted_under_the_key_that_the_others_have(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    talk = b'{"%s": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}'
    path.write_bytes(b"\n".join([talk % b"messages"] * 6 + [talk % b"turns"] * 4))
    _, tally = read(path)
    assert tally.dropped == {"missing_field:messages (found turns)": 4}


def test_hostile_keys_do_not_make_endless_reasons(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    wrong = [json.dumps({f"key{i}": 1}).encode() for i in range(MAX_REASONS + 100)]
    path.write_bytes(b"\n".join(wrong + [GOOD[0]] * len(wrong)))
    _, tally = read(path)
    assert len(tally.dropped) <= MAX_REASONS + 1 and tally.dropped["missing_field:text"] == 100


def test_a_line_over_the_limit_is_dropped_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MAX_LINE_BYTES", 1 << 17)
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD[0] + b"\n" + b'{"text": "' + b"x" * (1 << 18) + b'"}\n' + GOOD[1])
    records, tally = read(path)
    assert (len(records), dict(tally.dropped)) == (2, {"line_too_long": 1})


MEMORY = """
import resource, sys
from pathlib import Path
from microlm.text import sources
from microlm.text.sources import Tally
source = sources.parse("jsonl:" + sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tally = Tally()
kept = list(sources.read(source, tally, False))
print(len(kept), tally.dropped["line_too_long"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["plain", "gz", "zst"])
def test_a_50_megabyte_line_takes_less_than_100_megabytes(tmp_path: Path, packing: str) -> None:
    data = GOOD[0] + b"\n" + b'{"text": "' + b"x" * (50 << 20) + b'"}\n' + GOOD[1] + b"\n"
    path = tmp_path / "corpus.jsonl"
    pack = {"plain": bytes, "gz": lambda d: gzip.compress(d, 1), "zst": zstandard.compress}[packing]
    path.write_bytes(pack(data))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    kept, dropped, grown_kib = map(int, done.stdout.split())
    assert (kept, dropped) == (2, 1)
    assert grown_kib < 100 << 10


@settings(deadline=None, max_examples=60)
@given(
    data=st.lists(
        st.binary(max_size=40)
        | st.sampled_from([*GOOD[:2], *DROPPED.values()]).filter(lambda line: len(line) < 1000)
        | st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(st.characters(), max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["text", "messages", "role", "content", "relation", "chosen"]), inner
                )
            ),
        ).map(lambda value: json.dumps(value).encode()),
        max_size=12,
    ).map(b"\n".join),
    packing=st.sampled_from([bytes, gzip.compress, zstandard.compress]),
    cut=st.integers(0, 30),
    name=st.sampled_from(["random.jsonl", "random.txt"]),
)
def test_random_bytes_never_raise_anything_but_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, packing: type[bytes], cut: int, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    packed = packing(data)
    path.write_bytes(packed[: len(packed) - cut] if cut < 20 else packed)
    tally = Tally()
    source = sources.parse(f"{'jsonl' if name.endswith('jsonl') else 'text'}:{path}")
    try:
        kept = list(sources.read(source, tally, strict=False))
    except UserError as error:
        assert "\n" not in str(error)
        str(error).encode()  # can be printed
    else:
        assert len(kept) == tally.kept
    assert tally.read == tally.kept + tally.dropped.total()


PERSONAL = (
    "13930304461",
    "zhangsan@example.com",
    "4539148803436467",
    "联系人的手机号码是一三九，或 13930304461",
)


def test_no_drop_shows_personal_data() -> None:
    """What stands where a key, a role or a type should, whole or where its glimpse ends."""
    for word in PERSONAL:
        turn = {"content": [{"type": word, "text": "x"}], "role": "user"}
        lines: list[dict[str, Any]] = [
            {word: "x"},
            {"messages": [{"role": word, "content": "x"}]},
            {"messages": [turn]},
        ]
        drops = [parse_line(json.dumps(line).encode(), "f:1") for line in lines]
        told = [f"{d.reason} {d.detail}" for d in drops if isinstance(d, Drop)]
        assert len(told) == 3 and all("<" in t for t in told)
        assert not any(secret[:6] in t for secret in PERSONAL[:3] for t in told)


def test_a_csv_file_without_a_header_shows_no_personal_data(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(",".join(PERSONAL) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="its header row is '<PHONE>, <EMAIL>, <BANK_CARD>, ") as told:
        list(sources.read(sources.parse(f"csv:{path}"), Tally(), False))
    assert not any(secret[:6] in str(told.value) for secret in PERSONAL[:3])
