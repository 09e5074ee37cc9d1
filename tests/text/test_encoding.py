"""Token sets do not depend on blocks or processes; what cannot be used is counted, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import PROSE, write_data, write_tokenizer

from microlm.core.artifact import Artifact
from microlm.core.errors import UserError
from microlm.text import encoding, shards
from microlm.text.encoding import encode_files
from microlm.text.shards import TokenizeRecipe, open_sets
from microlm.text.sources import jsonl, packed
from microlm.text.tokenizer import Tokenizer

TALK = {"messages": [{"role": "user", "content": "李白"}, {"role": "assistant", "content": "唐代的诗人"}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_data(tmp_path_factory.mktemp("made") / "data", repeat=60)


@pytest.fixture(scope="module")
def tokenizer(data: Artifact) -> Artifact:
    return write_tokenizer(data.path.parent / "tokenizer", data)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".bin" or p.name == "index.json"}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_blocks_and_processes_change_no_byte(
    data: Artifact, tokenizer: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    encode_files([data.url], tokenizer.path, tmp_path / "whole")
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 3_000)
    monkeypatch.setattr(packed, "_PIECE", 1_000)
    monkeypatch.setattr(encoding, "_PROCESS_BYTES", 1_000)
    [documents, *_] = encoding.files_of_data(data.path, ["train"])
    assert len(list(documents.blocks())) >= 8
    encode_files([data.url], tokenizer.path, tmp_path / "parts", processes)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_the_stage_and_the_function_write_the_same(
    data: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    made = shards.run(TokenizeRecipe(out=str(tmp_path / "a"), data=data.url, tokenizer=tokenizer.url))
    index = encode_files([data.url], tokenizer.path, tmp_path / "b")
    assert content(made.path) == content(tmp_path / "b")
    assert made.json("index.json") == index
    assert list(index["sets"]) == [
        "documents-train", "conversations-chat-train",
        "documents-validation", "conversations-chat-validation",
    ]  # fmt: skip


def test_raw_files_are_encoded_and_what_cannot_be_used_is_counted(
    data: Artifact, tokenizer: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": t, "licence": "CC0-1.0"} for t in PROSE] + [TALK, {"text": 3}]
    preference = {"prompt": "q", "chosen": "a", "rejected": "b"}
    same = preference | {"rejected": "a"}
    path = write_lines(tmp_path / "mine.jsonl", [*rows, preference, same])
    made = shards.run(
        TokenizeRecipe(out=str(tmp_path / "out"), source=f"jsonl:{path}", tokenizer=tokenizer.url)
    )
    loaded = Tokenizer.load(tokenizer.path)
    found = open_sets(made.path, "", "train")
    assert [len(found[name].ends) for name in ("documents", "chat")] == [len(PROSE), 1]
    expected = [i for text in PROSE for i in [*loaded.encode(text), loaded.eos_id]]
    assert found["documents"].tokens.tolist() == expected
    assert made.manifest["licences"] == ["CC0-1.0"]
    told = made.json("logs/sources.json")[f"jsonl:{path}"]
    assert (told["read"], told["kept"], sum(told["dropped"].values())) == (9, 7, 2)
    assert told["dropped"]["equal_answers"] == 1
    assert "2 of 9 records dropped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": 3}', "expected str, found int"),
        ('{"text": "a", "colour": "red"}', "unknown key 'colour'"),
        ('{"source": "x"}', "key 'text' is missing"),
        ('{"text": "a"', "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("", "the line is empty"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_damaged_line_of_an_artifact_is_named(
    tokenizer: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, sentence: str
) -> None:
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 100)
    monkeypatch.setattr(packed, "_PIECE", 50)
    folder = tmp_path / "data"
    (folder / "documents").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    good = '{"text":"' + "a" * 70 + '"}\n'
    path = folder / "documents" / "train.jsonl"
    path.write_text(good * 4 + line + "\n" + good, encoding="utf-8")
    with pytest.raises(UserError, match=rf"train\.jsonl:5: .*{sentence}.*; make the file again"):
        encode_files([str(folder)], tokenizer.path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]  # nothing half written is left


def test_a_place_that_is_taken_is_left_alone(data: Artifact, tokenizer: Artifact, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        encode_files([data.url], tokenizer.path, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("both", [False, True])
def test_the_stage_takes_data_or_source(
    data: Artifact, tokenizer: Artifact, tmp_path: Path, both: bool
) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [{"text": "a"}])
    given = {"data": data.url, "source": f"jsonl:{path}"} if both else {}
    with pytest.raises(UserError, match=r"takes either data .* or source"):
        shards.run(TokenizeRecipe(out=str(tmp_path / "out"), tokenizer=tokenizer.url, **given))


def test_another_file_makes_another_artifact(tokenizer: Artifact, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [{"text": "李白"}])
    recipe = TokenizeRecipe(out=str(tmp_path / "out"), source=[f"jsonl:{path}"], tokenizer=tokenizer.url)
    first = shards.run(recipe)
    assert shards.run(recipe).key == first.key
    write_lines(path, [{"text": "杜甫"}])
    assert shards.run(recipe).key != first.key


def test_a_remade_tokenizer_at_the_same_place_is_the_one_used(data: Artifact, tmp_path: Path) -> None:
    """Workers keep a tokenizer by its file's time and size."""
    found = []
    for size in (300, 380):
        made = write_tokenizer(tmp_path / "tokenizer", data, vocab_size=size)
        encode_files([data.url], made.path, tmp_path / f"out-{size}")
        tokens = np.fromfile(tmp_path / f"out-{size}" / "documents-validation.tokens.bin", dtype="<u2")
        found.append(len(tokens))
        assert Tokenizer.load(made.path).decode(tokens) == "".join(PROSE)
    assert found[0] > found[1]
