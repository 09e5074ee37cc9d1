"""A source names the task of its conversations; the mixture then weighs a user's own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifacts import write_tokenizer

from microlm.core.artifact import open_artifact
from microlm.core.errors import UserError
from microlm.core.recipe import build
from microlm.core.records import Conversation, Document
from microlm.text import prepare, shards, sources
from microlm.text.encoding import encode_files
from microlm.text.prepare import PrepareRecipe
from microlm.text.shards import TokenizeRecipe, open_sets


def write_chats(path: Path, count: int, word: str, **fields: str) -> Path:
    """Chats in the forms of OpenAI and Alpaca by turns, and one document."""
    lines = [{"text": f"关于{word}的一篇文章，讲了很多事情。{word}是什么？这里都写了。"}]
    for i in range(count):
        turns = [
            {"role": "user", "content": f"{word}问{i}"},
            {"role": "assistant", "content": f"{word}答{i}"},
        ]
        alpaca = {"instruction": f"{word}问{i}", "output": f"{word}答{i}"}
        lines.append({"messages": turns, **fields} if i % 2 else {**alpaca, **fields})  # type: ignore[dict-item]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_name_goes_before_the_word(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "a=b.jsonl", 3, "法", task="old")
    named, plain = (sources.parse(word) for word in (f"law=jsonl:{path}", f"jsonl:{path}"))
    assert (named.task, named.kind, named.place) == ("law", "jsonl", str(path)) and plain.task == ""
    for source, expected in ((named, "law"), (plain, "old")):
        records = list(sources.read(source, sources.Tally(), strict=True))
        assert [r.task for r in records if isinstance(r, Conversation)] == [expected] * 3
        assert sum(isinstance(r, Document) for r in records) == 1
    assert named.fingerprint() == plain.fingerprint() | {"task": "law"}


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("documents=jsonl:x", "'documents' cannot name a task"),
        ("a b=jsonl:x", "'a b' cannot name a task"),
        ("=jsonl:x", "'' cannot name a task"),
        ("a=b=jsonl:x", "'a=b' cannot name a task"),
        ("law=factbook", "'law=factbook': is not one of|the factbook names its own"),
        ("law=jsonk:x", "did you mean 'jsonl'"),
        ("law=jsonl:nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_a_wrong_name_is_a_sentence(word: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        sources.parse(word)


def test_tables_have_the_name_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"instruction": f"问{i}", "output": f"答{i}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = ["instruction,output", *(f"{r['instruction']},{r['output']}" for r in rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind in ("parquet", "csv"):
        source = sources.parse(f"law={kind}:{tmp_path}/a.{kind}")
        found = list(sources.read(source, sources.Tally(), strict=True))
        assert [c.task for c in found if isinstance(c, Conversation)] == ["law"] * 5


def test_two_files_become_two_token_sets(tmp_path: Path) -> None:
    """Through the stage `data`, through raw files, and through `tokenizer encode`: the same two sets."""
    law, talk = write_chats(tmp_path / "law.jsonl", 40, "法"), write_chats(tmp_path / "talk.jsonl", 20, "聊")
    words = [f"law=jsonl:{law}", f"small-talk=jsonl:{talk}"]
    fields = {"out": str(tmp_path / "data"), "source": words, "fill": "none", "parallel": {"processes": 1}}
    data = prepare.run(build(PrepareRecipe, fields, "data"))
    tokenizer = write_tokenizer(tmp_path / "tokenizer", data)
    made = shards.run(TokenizeRecipe(out=str(tmp_path / "a"), data=data.url, tokenizer=tokenizer.url))
    raw = shards.run(TokenizeRecipe(out=str(tmp_path / "b"), source=words, tokenizer=tokenizer.url))
    encode_files(words, tokenizer.path, tmp_path / "c")
    sizes = {"law": 40, "small-talk": 20}
    for folder in (raw.path, tmp_path / "c"):
        found = open_sets(folder, "conversations-", "train")
        assert {name: len(tokens.ends) for name, tokens in found.items()} == sizes
    prepared = [open_sets(made.path, "conversations-", split) for split in ("train", "validation")]
    both = {name: sum(len(split[name].ends) for split in prepared if name in split) for name in sizes}
    assert both == sizes and set(prepared[0]) == set(sizes)
    renamed = {"out": str(tmp_path / "data"), "source": [words[0], f"talk=jsonl:{talk}"]}
    again = prepare.run(build(PrepareRecipe, fields | renamed, "data"))
    assert again.key != data.key and open_artifact(again.url).key == again.key
