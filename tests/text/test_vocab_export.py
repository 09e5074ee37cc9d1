"""Exports load in the programs they are for and give our ids; a difference is named and nothing is kept."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import gguf
import pytest
import shared_data
import tiktoken
from small_tokenizer import CONTROL, write
from tiktoken.load import load_tiktoken_bpe
from transformers import AutoTokenizer

from microlm.core.errors import CheckFailed, UserError
from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import MARKS, SPECIAL, Tokenizer
from microlm.text.vocab import export, gguf_file, ranks
from microlm.text.vocab.stage import TokenizerRecipe, run

LINES = [*export.sample_lines(), "a<|im_end|>b <think>", "x  1  2", "  \n\n 12345 ½Ⅷ", "IT'S 'LL it's"]
HELD_OUT = 10_000


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[Pieces, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {p: write(root / str(i), p) for i, p in enumerate(export.all_pieces())}


def test_the_sample_lines_are_the_same_every_time() -> None:
    assert export.sample_lines() == export.sample_lines() and len(LINES) > 600


def test_every_policy_goes_to_tiktoken(sources: dict[Pieces, Path], tmp_path: Path) -> None:
    some = LINES[::-3]
    for i, source in enumerate(sources.values()):
        written = export.to_tiktoken(source, tmp_path / f"{i}.tiktoken", some)
        assert written.lines == len(some)
    options = json.loads(ranks.beside(tmp_path / "0.tiktoken").read_bytes())
    encoding = tiktoken.Encoding(**options, mergeable_ranks=load_tiktoken_bpe(str(tmp_path / "0.tiktoken")))
    assert encoding.n_vocab == 600 and encoding.encode("<think>", allowed_special="all") == [3]
    assert encoding.decode(encoding.encode_ordinary("<|im_end|> 学而")) == "<|im_end|> 学而"


@pytest.mark.parametrize("policy", sorted({p for p, whole in gguf_file.PRE if not whole}, key=str), ids=str)
def test_a_policy_that_llama_cpp_has_goes_to_gguf(
    sources: dict[Pieces, Path], tmp_path: Path, policy: Pieces
) -> None:
    written = export.to_gguf(sources[policy], tmp_path / "made.gguf", LINES)
    assert written == (str(tmp_path / "made.gguf"), "llama.cpp", len(LINES))
    fields = gguf.GGUFReader(tmp_path / "made.gguf").fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert [kinds[i] == gguf_file.CONTROL for i in range(16)] == [t not in MARKS for t in CONTROL]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == SPECIAL.index("<|im_end|>")
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"
    assert not gguf.GGUFReader(tmp_path / "made.gguf").tensors


def test_a_policy_that_llama_cpp_has_not_is_refused(sources: dict[Pieces, Path], tmp_path: Path) -> None:
    known = {p for p, whole in gguf_file.PRE if not whole}
    for policy, source in sources.items():
        if policy not in known:
            with pytest.raises(UserError, match=f"llama.cpp has no equal of pattern {policy.pattern}"):
                export.to_gguf(source, tmp_path / "none.gguf", LINES)
    assert not list(tmp_path.iterdir())


def test_a_directory_for_transformers(sources: dict[Pieces, Path], tmp_path: Path) -> None:
    source = sources[Pieces()]
    (source / "notes.txt").touch()
    assert export.to_hf(source, tmp_path / "made", LINES).lines == len(LINES)
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with pytest.raises(UserError, match="is in the way"):
        export.to_hf(source, tmp_path / "made", LINES)


def test_a_difference_names_the_text_and_keeps_nothing(
    sources: dict[Pieces, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources[Pieces("gpt2", "runs")]
    monkeypatch.setattr(ranks, "one_regex", lambda pieces: r"\s+|\S")
    with pytest.raises(CheckFailed, match=r"line 2 \('the  the'\): tiktoken differs from token 0"):
        export.to_tiktoken(source, tmp_path / "a.tiktoken", ["x", "the  the"])
    monkeypatch.setitem(gguf_file.PRE, (Pieces("gpt4", "runs"), False), "smollm")
    with pytest.raises(CheckFailed, match=r"line 2 \('周末早上.*'\): llama.cpp differs from token "):
        export.to_gguf(sources[Pieces("gpt4", "runs")], tmp_path / "a.gguf", ["x", LINES[0]])
    config = json.loads((source / "tokenizer_config.json").read_bytes())
    other = tmp_path.parent / "other"
    write(other, Pieces("gpt2", "runs"))
    config["tokenizer_class"] = "LlamaTokenizerFast"
    (other / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckFailed, match="transformers"):
        export.to_hf(other, tmp_path / "hf", ["the the"])
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_makes_texts_nfc(tmp_path: Path) -> None:
    folder = write(tmp_path / "source", Pieces("qwen", "runs"))
    data = json.loads((folder / "tokenizer.json").read_bytes())
    data["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    for name, form in export.FORMS.items():
        assert form(folder, tmp_path / name, ["e\u0301 学"]).lines == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer is none of gpt2, gpt4, qwen"),
        ({"normalizer": {"type": "NFKC"}}, "has a normalizer"),
        ({"byte_fallback": True}, "is BPE with byte_fallback"),
    ],
)
def test_what_cannot_be_said_is_refused(
    sources: dict[Pieces, Path], tmp_path: Path, change: dict[str, object], told: str
) -> None:
    folder = write(tmp_path / "source", Pieces())
    data = json.loads((folder / "tokenizer.json").read_bytes())
    data |= {k: v for k, v in change.items() if k in data}
    data["model"] |= {k: v for k, v in change.items() if k not in data}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    for form in (export.to_tiktoken, export.to_gguf):
        with pytest.raises(UserError, match=told):
            form(folder, tmp_path / "none", LINES)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_file_that_llama_cpp_does_not_take_is_a_sentence(sources: dict[Pieces, Path]) -> None:
    source = Tokenizer.load(sources[Pieces()])
    known = export._open(source.path).known
    bad = gguf_file.Vocab(known, "no-such-pattern", None, None, None)
    with pytest.raises(UserError, match=r"llama.cpp does not take the file"):
        gguf_file.llama_ids(bad, ["x"])


@pytest.mark.shared
@pytest.mark.slow
def test_ids_are_equal_on_ten_thousand_real_lines(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in itertools.islice(shared_data.raw_lines("pretrain.jsonl.zst"), 4_000)]
    raw = tmp_path / "raw.jsonl"
    learnt = (json.dumps({"text": row["text"]}) + "\n" for row in rows[1_500:])
    raw.write_text("".join(learnt), encoding="utf-8")
    source = Path(run(TokenizerRecipe(out=str(tmp_path / "source"), source=f"jsonl:{raw}")).path)
    lines = [line for row in rows[:1_500] for line in row["text"].split("\n") if line][:HELD_OUT]
    assert len(lines) == HELD_OUT
    for name, form in export.FORMS.items():
        assert form(source, tmp_path / name, lines).lines == HELD_OUT
    tokenizer, theirs = Tokenizer.load(source), AutoTokenizer.from_pretrained(tmp_path / "hf")
    plain = [line for line in lines if not any(token in line for token in CONTROL)]
    assert theirs(plain, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(plain)
    assert tokenizer.vocab_size == 6400 and len(plain) > HELD_OUT * 0.99
