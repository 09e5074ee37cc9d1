"""Readers of files: any packing, table or folder gives the records of the lines; blocks are the source."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Document, Message
from microlm.text import sources
from microlm.text.read import Drop, Record
from microlm.text.sources import Tally, jsonl, packed, tables
from microlm.text.sources.shapes import parse_line

LINES = [
    b'{"text": "\xe6\xff"}' if i % 97 == 5 else json.dumps({"text": f"第{i}篇" * (i % 40 + 1)}).encode()
    for i in range(3000)
]
PACKINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def read(word: str) -> list[Record | Drop]:
    return [r for b in sources.blocks(sources.parse(word)) for r in sources.read_block(b)]


def serial(data: bytes, name: str) -> list[Record | Drop]:
    """What the reader of single lines makes of a file."""
    return [parse_line(line, f"{name}:{n}") for n, line in enumerate(data.splitlines(), 1)]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("size", [1, 4000, 1 << 16, 1 << 20])
def test_blocks_in_order_are_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, size: int
) -> None:
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", size)
    data = b"\n".join(LINES)
    path = tmp_path / f"c.jsonl{packing}"
    path.write_bytes(PACKINGS[packing](data))
    source = sources.parse(f"jsonl:{path}")
    cut = list(sources.blocks(source))
    assert len(cut) > 1 or size > len(data)
    apart = [r for b in cut for r in sources.read_block(pickle.loads(pickle.dumps(b)))]  # noqa: S301
    assert apart == serial(data, path.name)
    assert sum(b.consumed for b in cut) == path.stat().st_size == source.size_bytes()
    if size < 1 << 17 and not packing:  # the progress goes along
        assert max(b.consumed for b in cut) < path.stat().st_size / 4


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 60), max_size=30),
    ends=st.booleans(),
    block=st.integers(1, 100),
    piece=st.integers(1, 50),
    packing=st.sampled_from(sorted(PACKINGS)),
)
def test_lines_of_any_length_are_cut_alike(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    ends: bool,
    block: int,
    piece: int,
    packing: str,
) -> None:
    data = b"\n".join(b"x" * n for n in lengths) + (b"\n" if ends else b"")
    path = tmp_path_factory.getbasetemp() / f"any.jsonl{packing}"
    path.write_bytes(PACKINGS[packing](data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK_BYTES", block)
        patch.setattr(packed, "MAX_LINE_BYTES", 40)
        patch.setattr(packed, "_PIECE", piece)
        patch.setattr(packed, "_LARGEST", piece)
        if not data and not packing:
            return
        found = read(f"jsonl:{path}")
    whole = data.split(b"\n")[: None if data and data[-1:] != b"\n" else -1]
    reasons = ["line_too_long" if len(w) > 40 else "invalid_json" if w else "empty_line" for w in whole]
    assert [(d.place, d.reason) for d in found if isinstance(d, Drop)] == [
        (f"{path.name}:{n}", reason) for n, reason in enumerate(reasons, 1)
    ]


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, packing in (("b/2.jsonl", ".zst"), ("a.jsonl", ""), ("b/1.jsonl", ".gz")):
        path = tmp_path / (name + packing)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PACKINGS[packing](json.dumps({"text": name}).encode() + b"\n"))
    (tmp_path / ".hidden.jsonl").write_text("{")
    (tmp_path / "b" / "note.txt").write_text("x")
    whole = [
        Document("a.jsonl", "a.jsonl:1"),
        Document("b/1.jsonl", "b/1.jsonl.gz:1"),
        Document("b/2.jsonl", "b/2.jsonl.zst:1"),
    ]
    assert read(f"jsonl:{tmp_path}") == whole
    assert [r.text for r in read(f"jsonl:{tmp_path}/b/*.jsonl*") if isinstance(r, Document)] == [
        "b/1.jsonl",
        "b/2.jsonl",
    ]
    assert set(sources.parse(f"jsonl:{tmp_path}").fingerprint()) == {
        "kind", "split", "a.jsonl", "b/1.jsonl.gz", "b/2.jsonl.zst",
    }  # fmt: skip


def test_one_bad_shard_is_a_counted_drop(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_bytes(LINES[0])
    (tmp_path / "2.jsonl").write_bytes(b"")
    (tmp_path / "3.jsonl").write_bytes(LINES[1])
    tally = Tally()
    assert len(list(sources.read(sources.parse(f"jsonl:{tmp_path}"), tally, False))) == 2
    assert tally.dropped == {"unreadable_file": 1}
    with pytest.raises(UserError, match=r"2\.jsonl: holds no records.*; mend it, or set strict: false"):
        list(sources.read(sources.parse(f"jsonl:{tmp_path}"), Tally(), True))
    with pytest.raises(UserError, match=r"holds no \.jsonl.* file; check the pattern"):
        list(sources.blocks(sources.parse(f"jsonl:{tmp_path}/x*.jsonl")))


TABLE = [
    {"text": "一，“引”", "source": "书"},
    {"text": '两行：\n"第二行", 完', "source": ""},
    {"text": "三\r\n四", "source": "s"},
]


def to_csv(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_csv_file_is_its_rows(tmp_path: Path, name: str, delimiter: str, packing: str) -> None:
    path = tmp_path / (name + packing)
    path.write_bytes(PACKINGS[packing](b"\xef\xbb\xbf" + to_csv(TABLE, delimiter)))
    places = [f"{path.name}:{n}" for n in (2, 3, 5)]  # the second row takes two lines
    assert read(f"csv:{path}") == [
        Document(row["text"], row["source"] or place) for row, place in zip(TABLE, places, strict=True)
    ]


def test_rows_of_a_csv_file_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [b"text,source", b"a,s", b"b", b"", b"\xff,s", b"c\x00,s", b'"d""e",s', b"f,s,t"]
    path.write_bytes(b"\n".join(rows))
    reasons = [r.reason if isinstance(r, Drop) else r.text for r in read(f"csv:{path}")]
    assert reasons == ["a", "bad_row", "empty_line", "invalid_utf8", "nul_byte", 'd"e', "bad_row"]
    places = [r.place for r in read(f"csv:{path}") if isinstance(r, Drop)]
    assert places == [f"t.csv:{n}" for n in (3, 4, 5, 6, 8)]


def test_blocks_of_a_csv_file_do_not_change_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(to_csv(TABLE * 300))
    whole = read(f"csv:{path}")
    monkeypatch.setattr(tables, "BLOCK_BYTES", 700)
    cut = list(sources.blocks(sources.parse(f"csv:{path}")))
    assert len(cut) > 20 and [r for b in cut for r in sources.read_block(b)] == whole
    assert sum(b.consumed for b in cut) == path.stat().st_size


def test_a_csv_line_over_the_limit_leaves_the_next_row_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MAX_LINE_BYTES", 1 << 17)
    path = tmp_path / "t.csv"
    path.write_bytes(b'text\na\n"' + b"x" * (1 << 18) + b'\ny"\nb\n' + b"y" * (1 << 18) + b"\nc\n")
    reasons = [r.reason if isinstance(r, Drop) else r.text for r in read(f"csv:{path}")]
    assert reasons == ["a", "line_too_long", "b", "line_too_long", "c"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"title,body\nx,y\n", r"its header row is 'title, body'; expected a column 'text'"),
        (b"\n", "has no header row"),
        ("text\nx\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"", "the file is empty"),
        (
            gzip.compress(b"text\n" + bytes(range(32, 127)) * 99, mtime=0)[:40],
            "ends in the middle|holds no records",
        ),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_one_sentence(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words):
        list(sources.read(sources.parse(f"csv:{path}"), Tally(), False))


CHATS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": f"答{i}"}],
        "text": None,
    }
    for i in range(700)
]


def test_a_parquet_file_is_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(CHATS), path, row_group_size=123)
    whole = read(f"parquet:{path}")
    assert whole == [
        Conversation((Message("user", "问"), Message("assistant", f"答{i}")), source=f"t.parquet:{i + 1}")
        for i in range(700)
    ]
    monkeypatch.setattr(tables, "BLOCK_BYTES", 3000)
    cut = list(sources.blocks(sources.parse(f"parquet:{path}")))
    apart = [r for b in cut for r in sources.read_block(pickle.loads(pickle.dumps(b)))]  # noqa: S301
    assert len(cut) > 2 and apart == whole
    assert sum(b.consumed for b in cut) == path.stat().st_size


def test_a_damaged_parquet_file_is_a_sentence_or_a_drop(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rows = [{"text": f"{i * 7919 % 10007} 篇"} for i in range(5000)]
    pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=1000, compression="zstd", use_dictionary=False
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        read(f"parquet:{path}")
    middle = len(data) // 2
    path.write_bytes(
        data[:middle] + bytes(b ^ 0x55 for b in data[middle : middle + 99]) + data[middle + 99 :]
    )
    *before, last = read(f"parquet:{path}")
    assert isinstance(last, Drop) and last.reason == "damaged_file"
    assert (
        [r.text for r in before if isinstance(r, Document)]
        == [row["text"] for row in rows[: len(before)]]
        != []
    )


def test_a_text_of_a_table_that_is_not_utf8_is_one_drop(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    reasons = [r.reason if isinstance(r, Drop) else r.text for r in read(f"parquet:{tmp_path}/t.parquet")]
    assert reasons == ["a", "invalid_utf8", "c"]


def test_front_matter_is_no_part_of_a_markdown_document(tmp_path: Path) -> None:
    texts = {
        "a.md": "---\ntitle: 一\n---\n# 一\n\n---\n正文\n",
        "b/c.md": "+++\r\ntitle = 1\r\n+++\r\n二\r\n",
        "d.md": "没有\n---\n三\n",
        "e.markdown": "---\n没有结尾\n",
        "f.md": "---\ntitle: 空\n---\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    (tmp_path / "note.txt").write_text("x")
    found = [r.text if isinstance(r, Document) else r.reason for r in read(f"markdown:{tmp_path}")]
    assert found == ["# 一\n\n---\n正文\n", "二\r\n", "没有\n---\n三\n", "---\n没有结尾\n", "text_empty"]
    assert read(f"text:{tmp_path}")[0] == Document(texts["a.md"], "a.md")


def mixed() -> Iterator[dict[str, Any]]:
    for i in range(300):
        turns = [{"from": "human", "value": f"问{i}"}, {"from": "gpt", "value": "答"}]
        yield {"conversations": turns} if i % 4 else {"text": f"文{i}"}


def test_what_is_found_is_said_and_mixed_files_work(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed()) + "{\n", encoding="utf-8")
    source = sources.parse(f"jsonl:{path}")
    assert str(sources.detect(source)) == (
        "ShareGPT conversations (150 of 200 sampled), documents (50 of 200 sampled)"
    )
    tally = Tally()
    kinds = [type(r) for r in sources.read(source, tally, False)]
    assert (kinds.count(Conversation), kinds.count(Document)) == (225, 75)
    path.write_text('{"txt": 1}\n' + '{"text": "x"}\n' * 2, encoding="utf-8")
    assert str(sources.detect(source)) == "documents (2 of 3 sampled), 1 that cannot be used"


def test_the_key_that_is_missing_does_not_depend_on_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": "x", "output": "y"}] * 300 + [{"prompt": "x"}] * 200
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole = read(f"jsonl:{path}")
    assert isinstance(whole[-1], Drop) and whole[-1].reason == "missing_field:instruction (found prompt)"
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 1 << 13)
    assert read(f"jsonl:{path}") == whole
