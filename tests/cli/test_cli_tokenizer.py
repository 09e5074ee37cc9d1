"""`microlm tokenizer` from the command line: exit codes, ids, tables, pages, files for other programs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from small_tokenizer import write
from tiktoken.load import load_tiktoken_bpe

from microlm.cli import main
from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import Tokenizer
from microlm.text.vocab import domains

POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer of 600 entries and raw texts in two formats."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tok", Pieces())
    texts = [text for found in domains.samples().values() for text in found]
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "raw.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "raw.txt").write_text((POEM + "\n") * 40, encoding="utf-8")
    return tmp_path


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(["tokenizer", *words])
    return int(e.value.code or 0)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict:  # type: ignore[type-arg]
    capsys.readouterr()
    assert call(*words, "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert answer["schema"] == 1
    return dict(answer)


def test_train_on_files(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--source", "raw.jsonl", "--source", "raw.txt", "--out", "runs/mine", "--vocab-size"]
    [made] = said(capsys, *words, "500")["stages"]
    assert made["path"] == "runs/mine" and not made["skipped"]
    tokenizer = Tokenizer.load(Path("runs/mine"))
    assert tokenizer.vocab_size == 500 and tokenizer.decode(tokenizer.encode(POEM)) == POEM
    assert said(capsys, *words, "500")["stages"][0]["skipped"]
    [other] = said(capsys, "train", "pattern=qwen", *words[1:], "400", "--algorithm", "wordpiece")["stages"]
    assert other["digest"] != made["digest"]
    assert call("train", "vocab_sise=3", *words[1:], "500") == 2
    assert "did you mean 'vocab_size'" in capsys.readouterr().err
    assert call(*words, "500", "--dry-run") == 0
    assert "vocab_size: 500" in capsys.readouterr().out


def test_train_by_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "stage: tokenizer\nout: runs/r\nsource: [jsonl:raw.jsonl]\nvocab_size: 400\n"
    Path("r.yaml").write_text(recipe, encoding="utf-8")
    [made] = said(capsys, "train", "r.yaml", "min_frequency=3", "--vocab-size", "450")["stages"]
    assert made["path"] == "runs/r" and Tokenizer.load(Path("runs/r")).vocab_size == 450


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["train", "--source", "raw.jsonl"],
        ["train", "--out", "x"],
        ["train", "r.yaml", "--out", "x", "--source", "raw.jsonl"],
        ["train", "--source", "none.jsonl", "--out", "x"],
        ["train", "none.yaml"],
        ["compare"],
        ["compare", "--sizes", "400"],
        ["compare", "tok", "tok"],
        ["compare", "--sizes", "4k", "--source", "raw.jsonl"],
        ["compare", "tok", "--model", "27m"],
        ["compare", "tok", "--data", "tok"],
        ["eval", "none"],
        ["eval", "tok", "--domain", "poems"],
        ["encode", "none", "x"],
        ["encode", "tok", "--source", "raw.jsonl"],
        ["encode", "tok", "text", "--source", "raw.jsonl", "--out", "x"],
        ["encode", "tok", "--source", "none.jsonl", "--out", "x"],
        ["show", "x"],
        ["export", "tok"],
        ["export", "none", "--hf", "x"],
    ],
)
def test_a_mistake_is_a_sentence_and_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and len(err.strip().splitlines()) <= 4 and err.strip()
    assert not Path("x").exists()


def test_encode_gives_ids(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(Path("tok"))
    assert call("encode", "tok", POEM) == 0
    assert capsys.readouterr().out.split() == list(map(str, tokenizer.encode(POEM)))
    text = "<|im_start|>user"
    assert said(capsys, "encode", "tok", text)["ids"] == tokenizer.encode(text)
    assert said(capsys, "encode", "tok", text, "--control")["ids"][0] == tokenizer.start_id
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{POEM}\r\n".encode())))
    assert tokenizer.decode(said(capsys, "encode", "tok")["ids"]) == f"{POEM}\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert call("encode", "tok") == 2
    assert "byte 1 is not UTF-8" in capsys.readouterr().err


def test_encode_makes_token_sets_of_files(capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "encode", "tok", "--source", "raw.jsonl", "--source", "raw.txt", "--out", "sets/a")
    counts = told["sets"]["documents-train"]
    tokenizer = Tokenizer.load(Path("tok"))
    rows = [json.loads(line)["text"] for line in Path("raw.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [*rows, Path("raw.txt").read_text(encoding="utf-8")]
    ids = np.fromfile("sets/a/documents-train.tokens.bin", dtype="<u2")
    assert counts["samples"] == len(texts) and counts["tokens"] == len(ids)
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    decoded = [tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]
    assert [t.strip() for t in decoded] == [t.strip() for t in texts]
    assert call("encode", "tok", "--source", "raw.jsonl", "--out", "sets/a") == 2
    assert "is in the way" in capsys.readouterr().err
    assert call("encode", "tok", "--source", "raw.jsonl", "--out", "sets/b") == 0
    assert capsys.readouterr().out.startswith("documents-train: 36 samples, ")


def test_eval_measures_by_domain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "eval", "tok", "--out", "eval.html")
    assert [row["domain"] for row in told["rows"]] == list(domains.NAMES)
    assert told["tokenizers"][0]["changed_texts"] == 0 and told["budget"] == []
    assert "classical Chinese" in (folder / "eval.html").read_text(encoding="utf-8")
    told = said(capsys, "eval", "tok", "--domain", "poem=raw.txt")
    [row] = told["rows"]
    ids = Tokenizer.load(folder / "tok").encode(POEM)
    assert row["bytes_per_token"] == len(POEM.encode()) / len(ids) and row["texts"] == 40


def test_compare_shows_tokenizers_and_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "old=tok", "--sizes", "400,500,400", "--source", "raw.jsonl", "--model", "26m"]
    assert call(*words, "--model", "128x2", "--out", "compare.html") == 0
    out = capsys.readouterr().out
    assert "old" in out and "classical Chinese" in out and "128x2" in out
    told = said(capsys, *words)
    assert [t["tokenizer"] for t in told["tokenizers"]] == ["old", "400", "500"] and told["sizes"] == [
        "400",
        "500",
    ]
    sizes = {r["tokenizer"]: r["share_tied"] for r in told["budget"]}
    assert sizes["400"] < sizes["500"] < sizes["old"]
    html = (folder / "compare.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 3 and "128x2" in html


def test_the_ready_tokenizer_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "eval", "builtin:zh-6400", "--domain", "poem=raw.txt")
    ids = said(capsys, "encode", "builtin:zh-6400", POEM)["ids"]
    assert told["rows"][0]["bytes_per_token"] == len(POEM.encode()) / len(ids)
    [written] = said(capsys, "export", "builtin:zh-6400", "--tiktoken", "t.tiktoken")["written"]
    assert written["lines"] > 600
    assert call("encode", "builtin:none", "x") == 2


def test_show_parts_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", "学鼂\x1b[2J", "--tokenizer", "tok", "--out", "show.html") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("学²│鼂³│\\x1b│[│2│J") and "\x1b" not in out
    assert 'class="p0"' in (folder / "show.html").read_text(encoding="utf-8")
    told = said(capsys, "show", "raw.txt", "--tokenizer", "a=tok", "--tokenizer", "b=tok")
    assert told["cuts"]["a"] == told["cuts"]["b"]
    assert "".join(part["text"] for part in told["cuts"]["a"]) == (POEM + "\n") * 40
    Path("long.txt").write_text("a" * 9_000, encoding="utf-8")
    assert call("show", "long.txt", "--tokenizer", "tok") == 0
    assert "more characters" in capsys.readouterr().out


def test_export_writes_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    Path("lines.txt").write_text(f"{POEM}\na<|im_end|>\n", encoding="utf-8")
    words = ["export", "tok", "--tiktoken", "new/t.tiktoken", "--gguf", "g.gguf"]
    written = said(capsys, *words, "--lines", "lines.txt")["written"]
    assert [(w["program"], w["lines"]) for w in written] == [("tiktoken", 2), ("llama.cpp", 2)]
    options = json.loads(Path("new/t.tiktoken.json").read_bytes())
    encoding = tiktoken.Encoding(**options, mergeable_ranks=load_tiktoken_bpe("new/t.tiktoken"))
    assert encoding.encode(POEM) == Tokenizer.load(Path("tok")).encode(POEM)
    assert call("export", "tok", "--gguf", "h.gguf", "--no-check") == 0
    assert capsys.readouterr().out == "h.gguf: not compared\n"
    assert Path("h.gguf").read_bytes() == Path("g.gguf").read_bytes()


@pytest.mark.parametrize("command", ["train", "eval", "compare", "encode", "show", "export"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert f"\n    microlm tokenizer {command} " in capsys.readouterr().out
