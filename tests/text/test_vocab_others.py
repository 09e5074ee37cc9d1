"""Unigram and WordPiece lose nothing and give users no control token; SentencePiece does as its library."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from small_tokenizer import CONTROL

from microlm.core.errors import UserError
from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import Tokenizer
from microlm.text.vocab import domains, others
from microlm.text.vocab.others import Algorithm

TEXTS = [text for texts in domains.samples().values() for text in texts]
SIZE = 1500


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[Algorithm, Tokenizer]:
    found: dict[Algorithm, Tokenizer] = {}
    for algorithm in ("unigram", "wordpiece"):
        folder = tmp_path_factory.mktemp(algorithm)
        trained = others.train(algorithm, TEXTS, SIZE, Pieces(), CONTROL)
        assert (trained.files, trained.texts, trained.left_out) == ({}, len(TEXTS), 0)
        trained.inner.save(str(folder / "tokenizer.json"))
        found[algorithm] = Tokenizer.load(folder)
    return found


@pytest.mark.parametrize("algorithm", ["unigram", "wordpiece"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=200)
def test_nothing_is_lost(made: dict[Algorithm, Tokenizer], algorithm: Algorithm, text: str) -> None:
    tokenizer = made[algorithm]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and min(ids, default=99) >= len(CONTROL)


@pytest.mark.parametrize("algorithm", ["unigram", "wordpiece"])
def test_ids_and_size_are_as_asked(made: dict[Algorithm, Tokenizer], algorithm: Algorithm) -> None:
    tokenizer = made[algorithm]
    assert SIZE * 0.8 < tokenizer.vocab_size <= SIZE  # unigram finds no more in so little text
    assert list(tokenizer.control.items()) == [(token, i) for i, token in enumerate(CONTROL)]
    assert sorted(tokenizer.token_bytes[len(CONTROL) : len(CONTROL) + 256]) == [
        bytes([i]) for i in range(256)
    ]
    for token in CONTROL:
        assert tokenizer.encode(token, allow_control=True) == [tokenizer.control[token]]
        assert min(tokenizer.encode(f"a{token} {token}")) >= len(CONTROL)
    long = "学" * 2_000 + "a" * 2_000 + "\U0001f600" * 500
    assert tokenizer.decode(tokenizer.encode(long)) == long
    sizes = [sum(map(len, tokenizer.encode_batch(TEXTS))), sum(len(t.encode()) for t in TEXTS)]
    assert sizes[0] * 2 < sizes[1]


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for algorithm in ("wordpiece", "sentencepiece"):
        runs = [others.train(algorithm, TEXTS[:12], SIZE, Pieces(), CONTROL) for _ in range(2)]
        assert runs[0].inner.to_str() == runs[1].inner.to_str() and runs[0].files == runs[1].files


def test_a_sentencepiece_model_and_its_json_agree() -> None:
    trained = others.train("sentencepiece", TEXTS, SIZE, Pieces(), CONTROL)
    theirs = SentencePieceProcessor(model_proto=trained.files[others.MODEL])
    trained.inner.encode_special_tokens = True
    assert trained.inner.get_vocab_size() == theirs.get_piece_size()
    for text in [*TEXTS, "鼂\x00😀é 全角ＡＢ①", "  a  ", "<|endoftext|><|reserved_3|>", ""]:
        ours = trained.inner.encode(text, add_special_tokens=False).ids
        assert len(ours) == len(theirs.encode(text)) and trained.inner.decode(ours) == text
        assert sum(map(theirs.get_score, ours)) == pytest.approx(
            sum(map(theirs.get_score, theirs.encode(text)))
        )
        assert theirs.decode(theirs.encode(text)) == text and 3 not in ours


def test_a_sentencepiece_model_is_for_comparison_only(tmp_path: Path) -> None:
    trained = others.train("sentencepiece", TEXTS, SIZE, Pieces(), CONTROL)
    trained.inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not of byte-level BPE"):
        Tokenizer.load(tmp_path).decode([100])


def test_sentencepiece_does_not_find_typed_control_tokens(tmp_path: Path) -> None:
    drawn = random.Random(0)
    texts = [
        "".join(drawn.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏", k=40)) for _ in range(300)
    ]
    trained = others.train("sentencepiece", texts, 600, Pieces(), CONTROL)
    trained.inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    for typed in ("<|im_start|>", "天<|im_end|>地", "<think>"):
        assert not set(tokenizer.encode(typed)) & set(tokenizer.control.values())
        assert set(tokenizer.encode(typed, allow_control=True)) & set(tokenizer.control.values())


def test_what_is_too_much_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(others.MAX_CHARS, "wordpiece", sum(map(len, TEXTS[:4])))
    trained = others.train("wordpiece", iter(TEXTS), 300, Pieces(), CONTROL)
    assert trained.texts + trained.left_out == len(TEXTS) and 0 < trained.texts < len(TEXTS)


def test_the_sample_is_the_same_in_any_order() -> None:
    rng = random.Random(3)
    for most in (40, 700, 5000):
        texts = [str(rng.random()) * rng.choice((1, 8, 60)) for _ in range(60)]
        used, left_out = others._within(texts, most)
        assert sum(map(len, used)) <= most and len(used) > 0 and len(used) + left_out == len(texts)
        for _ in range(20):
            rng.shuffle(texts)
            assert others._within(texts, most) == (used, left_out)
    [one], _ = others._within(["a" * 900], 100)
    assert one == "a" * 100


def test_what_cannot_be_learnt_is_a_sentence() -> None:
    with pytest.raises(UserError, match="set it to 273 or more"):
        others.train("unigram", TEXTS, 272, Pieces(), CONTROL)
    with pytest.raises(UserError, match="no text to learn from"):
        others.train("wordpiece", ["", ""], 300, Pieces(), CONTROL)
    with pytest.raises(UserError, match=r"smaller than required_chars.*change vocab_size"):
        others.train("sentencepiece", TEXTS, 300, Pieces(), CONTROL)
