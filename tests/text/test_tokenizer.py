"""Our tokenizer = the string again, = transformers; what users type never becomes control."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifacts import PROSE, write_data, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from microlm.core.artifact import Artifact
from microlm.core.errors import UserError
from microlm.text import chat
from microlm.text.tokenizer import FILES, MARKS, SPECIAL, Tokenizer, copy_files, reserved

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SHAPED = st.lists(
    st.sampled_from(
        [*SPECIAL, "李白", "唐代的诗人", " ", "\n", "701", "poet", "é", "👩🏽‍🚀", "\0", "\u2028", "<|"]
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_data(tmp_path_factory.mktemp("run") / "data")


@pytest.fixture(scope="module", params=[False, True], ids=["words", "han_alone"])
def trained(request: pytest.FixtureRequest, data: Artifact) -> Artifact:
    out = data.path.parent / f"tokenizer-{request.param}"
    return write_tokenizer(out, data, han_alone=request.param)


@pytest.fixture(scope="module")
def tokenizer(trained: Artifact) -> Tokenizer:
    return Tokenizer.load(trained.path)


@settings(max_examples=150, deadline=None)
@given(text=TEXT | SHAPED)
def test_decode_of_encode_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    assert not {tokenizer.pad_id, tokenizer.start_id, tokenizer.eos_id} & set(ids)


@settings(max_examples=100, deadline=None)
@given(text=TEXT | SHAPED, cut=st.integers(0, 60))
def test_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text
    early = tokenizer.stream()
    begun = "".join(early.push(i) for i in ids[:cut]) + early.finish()
    assert text.startswith(begun)
    if "\ufffd" not in text:
        assert "\ufffd" not in begun


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT | SHAPED, max_size=4))
def test_batch_is_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


def test_ids_are_those_of_transformers(trained: Artifact, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(trained.path)
    for text in [
        *PROSE,
        "  two\n\n spaces\t12 x=5",
        "naïve 👩🏽‍🚀 e\u0301",
        "<|im_end|> typed <|im_start|>user",
    ]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
        assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
    assert theirs.chat_template == chat.template_text(None)
    assert theirs.bos_token is None and theirs.unk_token is None
    assert set(theirs.all_special_tokens) == set(SPECIAL)


def test_control_tokens_are_the_first_ids(trained: Artifact) -> None:
    inner = json.loads((trained.path / "tokenizer.json").read_bytes())
    assert [(t["id"], t["content"], t["special"]) for t in inner["added_tokens"]] == [
        (i, token, token not in MARKS) for i, token in enumerate((*SPECIAL, *MARKS, *reserved(7)))
    ]


def test_han_characters_stand_alone_when_asked(data: Artifact, tmp_path: Path) -> None:
    alone = Tokenizer.load(write_tokenizer(tmp_path / "a", data, han_alone=True).path)
    words = Tokenizer.load(write_tokenizer(tmp_path / "w", data).path)
    text = "李白是唐代的诗人"
    assert [alone.decode([i]) for i in alone.encode(text)] == list(text)
    assert len(words.encode(text)) < len(text)
    assert all(sum(b in b"0123456789" for b in token) <= 1 for token in alone.token_bytes + words.token_bytes)


def test_equal_recipes_give_equal_bytes(data: Artifact, tmp_path: Path) -> None:
    first, second = (write_tokenizer(tmp_path / name, data) for name in "ab")
    assert first.digest == second.digest
    assert write_tokenizer(tmp_path / "c", data, vocab_size=380).digest != first.digest


def test_a_small_corpus_gives_its_true_size(
    data: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_tokenizer(tmp_path / "t", data, vocab_size=50_000)
    size = Tokenizer.load(made.path).vocab_size
    assert size == made.manifest["metrics"]["vocab_size"] < 50_000
    assert f"{size} of 50000 (the corpus has no more merges)" in capsys.readouterr().err


def test_fertility_counts_what_is_held_out(trained: Artifact, tokenizer: Tokenizer) -> None:
    rows = {row["domain"]: row for row in json.loads((trained.path / "logs/fertility.json").read_bytes())}
    assert list(rows) == ["Chinese prose", "English", "conversation", "extraction JSON"]
    english = [t for t in PROSE if t.isascii()]
    tokens, size = sum(len(tokenizer.encode(t)) for t in english), sum(len(t.encode()) for t in english)
    expected = {
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "tokens_per_char": tokens / size,
    }
    assert rows["English"] == {"domain": "English"} | expected
    assert rows["extraction JSON"]["bytes"] == len('{"李白":{"朝代":"唐代"}}'.encode())


def test_a_domain_without_text_is_null(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", prose=PROSE[:3])
    made = write_tokenizer(tmp_path / "t", data)
    assert made.manifest["metrics"]["bytes_per_token"]["English"] is None


@pytest.mark.parametrize("limit", [1, None])
def test_max_documents_limits_what_is_read(data: Artifact, tmp_path: Path, limit: int | None) -> None:
    made = write_tokenizer(tmp_path / "t", data, max_documents=limit)
    assert made.manifest["metrics"]["texts"] == (1 + 2 if limit else 20 * (5 + 6))


def test_too_small_a_vocabulary_is_refused(data: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set vocab_size to 272 or more"):
        write_tokenizer(tmp_path / "t", data, vocab_size=271)
    bytes_only = Tokenizer.load(write_tokenizer(tmp_path / "t", data, vocab_size=272).path)
    marks = [len(mark) for mark in MARKS]
    assert [len(token) for token in bytes_only.token_bytes] == [0, 0, 0, *marks] + [0] * 7 + [1] * 256


def test_no_text_is_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", repeat=0)
    with pytest.raises(UserError, match="no training text"):
        write_tokenizer(tmp_path / "t", data)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", prose=[*PROSE, 3])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"train\.jsonl:6: expected str"):
        write_tokenizer(tmp_path / "t", data)


def test_copy_files_copies_exactly_the_tokenizer(trained: Artifact, tmp_path: Path) -> None:
    copy_files(trained.path, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted(FILES)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        copy_files(tmp_path, tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no tokenizer.json"),
        (b"", "not a tokenizer file"),
        (b'{"model": 3}', "not a tokenizer file"),
        (b"\xff\xfe", "not a tokenizer file"),
    ],
)
def test_a_damaged_tokenizer_is_one_sentence(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_chatml_is_refused(trained: Artifact, tmp_path: Path) -> None:
    inner = json.loads((trained.path / "tokenizer.json").read_bytes())
    inner["added_tokens"] = [t for t in inner["added_tokens"] if t["content"] != "<|im_end|>"]
    inner["model"]["vocab"]["other"] = inner["model"]["vocab"].pop("<|im_end|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(inner), encoding="utf-8")
    with pytest.raises(UserError, match=r"no <\|im_end\|>"):
        Tokenizer.load(tmp_path)
