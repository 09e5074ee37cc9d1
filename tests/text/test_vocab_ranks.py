"""Ranks of tiktoken: one pattern = our two steps; what is read encodes as tiktoken does."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import write
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Regex, pre_tokenizers

from microlm.core.errors import UserError
from microlm.text.bpe.pieces import Pieces
from microlm.text.vocab import domains, export, ranks

AWKWARD = (
    "aZsStTrReEvVmMlLdDſK'’\"  \t\n\r\x0b\x85\xa0\u3000\u200b0123456789²½Ⅷ〇一二中文，。！,.-_éßﬁ\u0301😀"
)
TEXTS = st.text(st.one_of(st.sampled_from(AWKWARD), st.characters(exclude_categories=["Cs"])), max_size=40)
RULES = export.all_pieces()


def name(pieces: Pieces) -> str:
    return f"{pieces.pattern}-{pieces.digits}-{pieces.whitespace}-{pieces.han_alone}"


def cut(splitter: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [text[a:b] for _, (a, b) in splitter.pre_tokenize_str(text) if b > a]


@pytest.mark.parametrize("pieces", RULES, ids=name)
@given(text=TEXTS)
@settings(max_examples=60)
def test_one_pattern_cuts_as_the_two_steps_do(pieces: Pieces, text: str) -> None:
    one = pre_tokenizers.Split(Regex(ranks.one_regex(pieces)), "isolated")
    assert cut(one, text) == cut(pieces.pre_tokenizer(), text)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    source = write(folder / "source", Pieces("qwen", "runs"))
    export.to_tiktoken(source, folder / "mine.tiktoken", [])
    return folder / "mine.tiktoken"


def test_what_is_read_encodes_as_tiktoken_does(exported: Path) -> None:
    import json

    inner = ranks.read(exported)
    inner.encode_special_tokens = True
    options = json.loads(ranks.beside(exported).read_bytes())
    theirs = tiktoken.Encoding(**options, mergeable_ranks=load_tiktoken_bpe(str(exported)))
    for text in [t for texts in domains.samples().values() for t in texts] + export.sample_lines():
        assert inner.encode(text, add_special_tokens=False).ids == theirs.encode_ordinary(text), text


def test_without_its_json_the_pattern_is_asked_for(exported: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.tiktoken"
    alone.write_bytes(exported.read_bytes())
    with pytest.raises(UserError, match=r"584 ranks are of no vocabulary that is known.*alone.tiktoken.json"):
        ranks.read(alone)
    ranks.beside(alone).write_text('{"pat_str": "(", "special_tokens": {}}', encoding="utf-8")
    with pytest.raises(UserError, match="expected pat_str and special_tokens"):
        ranks.read(alone)


def lines(extra: str = "", count: int = 256) -> bytes:
    rows = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(count)]
    return "\n".join([*rows, extra]).encode()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x00\xff what", ":1: expected a token in base64"),
        (lines("YWI="), ":257: expected a token in base64"),
        (lines("YWI= x"), ":257: expected a token in base64"),
        (lines("AA== 300"), ":257: the token is empty or there twice"),
        (lines("YWI= -1"), ":257: the token is empty or there twice"),
        (lines("YWI= 7"), "two tokens have one rank"),
        (lines(count=255), "1 of the 256 bytes have no rank"),
        (b"", "256 of the 256 bytes have no rank"),
    ],
)
def test_a_damaged_file_is_a_sentence(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "bad.tiktoken"
    file.write_bytes(content)
    with pytest.raises(UserError) as e:
        ranks.read(file)
    assert told in str(e.value) and str(file) in str(e.value)
