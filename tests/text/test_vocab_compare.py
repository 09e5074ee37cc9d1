"""Measures of tokenizers by hand, parts that are the whole text, shares equal to a real model's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import artifacts
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import train, write

from microlm.cli.compare import shape_of
from microlm.core.errors import UserError
from microlm.core.manifest import open_artifact
from microlm.model.presets import PRESETS, named_shape
from microlm.model.transformer import Decoder
from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import Tokenizer
from microlm.text.vocab import compare, domains, others, page, peers, view

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "中", "国", "a", "##b", "。"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> peers.Peer:
    file = tmp_path_factory.mktemp("bert") / "vocab.txt"
    file.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return peers.open_peer(f"bert={file}")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> peers.Peer:
    return peers.open_peer(f"ours={write(tmp_path_factory.mktemp('ours') / 'tokenizer', Pieces())}")


def test_a_lossy_tokenizer_by_hand(bert: peers.Peer) -> None:
    row = compare.measure(bert, ["中国 Ab。", "中鼂。", "国"])
    assert row == {
        "texts": 3, "bytes": 6 + 1 + 2 + 3 + 9 + 3, "characters": 10,
        "tokens": 2 + 2 + 1 + 3 + 1, "bytes_per_token": 24 / 9, "tokens_per_character": 9 / 10,
        "unknown_tokens": 1, "lost_characters": 1, "changed_texts": 2,
    }  # fmt: skip
    [first, second] = [
        view.parts(t, c)
        for t, c in zip(["中国 Ab。", "中鼂。"], bert.cut(["中国 Ab。", "中鼂。"]), strict=True)
    ]
    assert first == [
        ("中", 1, "token"), ("国", 1, "token"), (" ", 0, "dropped"), ("A", 1, "token"), ("b", 1, "token"),
        ("。", 1, "token"),
    ]  # fmt: skip
    assert second == [("中", 1, "token"), ("鼂", 1, "unknown"), ("。", 1, "token")]


def test_a_lossless_tokenizer_by_hand(ours: peers.Peer) -> None:
    row = compare.measure(ours, ["鼂", "<|im_end|>", "\x00 \n"])
    assert (row["unknown_tokens"], row["lost_characters"], row["changed_texts"]) == (0, 0, 0)
    [cut] = ours.cut(["a鼂😀"])
    assert view.parts("a鼂😀", cut)[0] == ("a", 1, "token")
    assert [(p.text, p.kind) for p in view.parts("a鼂😀", cut)] == [(c, "token") for c in "a鼂😀"]
    assert sum(p.tokens for p in view.parts("a鼂😀", cut)) == len(cut.ids)
    assert compare.measure(ours, [])["bytes_per_token"] is None


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=150)
def test_parts_are_the_whole_text_and_all_tokens(bert: peers.Peer, ours: peers.Peer, text: str) -> None:
    for peer in (bert, ours):
        [cut] = peer.cut([text])
        parts = view.parts(text, cut)
        assert "".join(p.text for p in parts) == text
        assert sum(p.tokens for p in parts) == len(cut.ids)
    assert view.lost_characters(text, cut) == 0 and ours.decode(cut.ids) == text


def test_sentencepiece_is_cut_by_its_own_spans(tmp_path: Path) -> None:
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [t for found in domains.samples().values() for t in found]
    (tmp_path / "tokenizer.model").write_bytes(others.train_sentencepiece(texts, 1500, control))
    peer = peers.open_peer(str(tmp_path))
    assert peer.algorithm == "SentencePiece" and peer.vocab_size <= 1500
    for text in ["学而时习之", "a  b 鼂😀", " 全角ＡＢ①", ""]:
        [cut] = peer.cut([text])
        parts = view.parts(text, cut)
        assert "".join(p.text for p in parts) == text and sum(p.tokens for p in parts) == len(cut.ids)
        assert peer.decode(cut.ids) == text and view.lost_characters(text, cut) == 0


@pytest.mark.parametrize("word", [*PRESETS, "512x8"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_share_is_that_of_the_real_model(word: str, tied: bool) -> None:
    shape, size = shape_of(word), 1000
    config = replace(named_shape(word), tied=tied).config(size, 64, 1e4)
    import torch

    with torch.device("meta"):
        counts = {n: p.numel() for n, p in Decoder(config).named_parameters()}
    outer = sum(n for name, n in counts.items() if "embed" in name or "lm_head" in name)
    assert shape.body == sum(counts.values()) - outer
    assert shape.embedding(size, tied=tied) == outer
    assert shape.share(size, tied=tied) == outer / sum(counts.values())


@pytest.mark.parametrize(
    ("word", "told"), [("27m", "did you mean '26m'"), ("100x8", "multiple of 64"), ("x", "known")]
)
def test_a_model_that_is_none_is_a_sentence(word: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        named_shape(word)
    assert named_shape("512x8").intermediate_size == 1344


def test_every_sample_looks_like_its_domain() -> None:
    found = domains.samples()
    assert list(found) == list(domains.NAMES) and all(len(texts) >= 4 for texts in found.values())
    for name in ("modern Chinese", "classical Chinese", "English", "code", "JSON"):
        assert [domains.classify(t) for t in found[name]] == [name] * len(found[name])


def test_domains_of_a_data_artifact(tmp_path: Path) -> None:
    samples = domains.samples()
    prose = [*samples["modern Chinese"], *samples["classical Chinese"], *samples["English"], *samples["code"]]
    found = domains.of_data(artifacts.write_data(tmp_path / "data", prose, repeat=1), 3)
    assert {k: len(v) for k, v in found.items()} == {
        "modern Chinese": 3, "classical Chinese": 3, "English": 3, "code": 3, "JSON": 1, "dialogue": 3,
    }  # fmt: skip
    assert found["English"] == samples["English"][:3]
    assert found["dialogue"][0] == "\n".join(artifacts.TURNS[0])


def test_domains_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("一\n\n二\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "三"}\n{"text": "四"}\n', encoding="utf-8")
    words = [f"诗={tmp_path}/a.txt", f"b={tmp_path}/b.jsonl"]
    assert domains.of_words(words, 9) == {"诗": ["一", "二"], "b": ["三", "四"]}
    assert domains.of_words(words[1:], 1) == {"b": ["三"]}
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n', encoding="utf-8")
    for word, told in [
        ("poems", "expected NAME=FILE"),
        (f"b={tmp_path}/none.txt", "no such file"),
        (f"b={tmp_path}/empty.txt", "holds no text"),
        (f"b={tmp_path}/bad.txt", "byte 0 is not UTF-8"),
        (f"b={tmp_path}/bad.jsonl", "bad.jsonl:2"),
    ]:
        with pytest.raises(UserError) as e:
            domains.of_words([word], 9)
        assert told in str(e.value)
    with pytest.raises(UserError, match="is there already"):
        domains.of_words([words[0], words[0]], 9)


def test_a_report_averages_domains_and_draws_sizes(bert: peers.Peer, ours: peers.Peer) -> None:
    found = {"Han": ["中国。"], "Latin": ["ab ab", "<b>&"]}
    report = compare.compare([bert, ours], found, [shape_of("26m")], sizes=["bert", "ours"])
    rates = [r["bytes_per_token"] for r in report["rows"] if r["tokenizer"] == "ours"]
    assert report["tokenizers"][1]["bytes_per_token"] == sum(rates) / 2
    row = next(r for r in report["budget"] if r["tokenizer"] == "ours")
    assert row["work_per_byte"] == pytest.approx((row["body"] + 512 * row["vocab_size"]) / (sum(rates) / 2))
    told = compare.to_json(report)
    assert json.loads(json.dumps(told)) == told
    html = page.comparison(report, "<x>")
    assert "&lt;x&gt;" in html and html.count("<svg") == 3 and 'class="unknown"' in html
    without = page.comparison({**report, "sizes": []}, "x")
    assert without.count("<svg") == 1


def package(folder: Path, files: dict[str, bytes]) -> None:
    """An installed package `carrier` with data files."""
    info = folder / "carrier-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"carrier/{name},,\n" for name in files))
    (folder / "carrier").mkdir()
    for name, data in files.items():
        (folder / "carrier" / name).write_bytes(data)


def test_a_package_that_carries_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = train(Pieces(), 300).to_str().encode()
    package(
        tmp_path, {"tokenizer.json": inner, "vocab.txt": "\n".join(WORDS).encode(), "__init__.py": b"1/0"}
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UserError, match=r"choose one of package:carrier/tokenizer.json, package:carrier/vocab.txt"
    ):
        peers.open_peer("package:carrier")
    assert peers.open_peer("package:carrier/vocab.txt").algorithm == "WordPiece"
    assert peers.open_peer("x=package:carrier/tokenizer.json").name == "x"
    with pytest.raises(UserError, match="'nothing-here' is not installed"):
        peers.open_peer("package:nothing-here")
    with pytest.raises(UserError, match="carries no tokenizer"):
        peers.open_peer("package:pytest")


def test_what_is_no_tokenizer_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in {
        "tokenizer.json": b"{}",
        "vocab.txt": b"a\nb",
        "m.model": b"nothing",
        "a.bin": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "empty").mkdir()
    for word, told in [
        ("nowhere", "no tokenizer there"),
        ("tokenizer.json", "not a tokenizer file"),
        ("vocab.txt", "has no [UNK]"),
        ("m.model", "not a SentencePiece model"),
        ("a.bin", "not a tokenizer; expected"),
        ("empty", "holds no tokenizer"),
    ]:
        with pytest.raises(UserError) as e:
            peers.open_peer(str(tmp_path / word))
        assert told in str(e.value), word
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no such directory here, and no tokenizer.json from the hub"):
        peers.open_peer("no-such-owner/no-such-model")


def test_lower_case_follows_the_directory(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "a", "A"]), encoding="utf-8")
    [cut] = peers.open_peer(str(tmp_path)).cut(["A"])
    assert cut.ids == [3]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    [cut] = peers.open_peer(str(tmp_path)).cut(["A"])
    assert cut.ids == [4]


def test_typed_control_tokens_are_text_to_every_peer() -> None:
    ready = open_artifact("builtin:zh-6400").path
    text = "<think>a</think><|im_end|>"
    [cut] = peers.open_peer(str(ready)).cut([text])
    assert list(cut.ids) == Tokenizer.load(ready).encode(text)
