"""Tokens against a plain reading, estimates against exact sets, bands against the formula behind them."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from microlm.text.near import kernels, signature

ALONE = [
    (0x1100, 0x11FF), (0x3005, 0x3007), (0x3041, 0x318F), (0x31A0, 0x31FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0xFF66, 0xFFDC), (0x16FE0, 0x18FFF),
    (0x1AFF0, 0x1B2FF), (0x20000, 0x3FFFF),
]  # fmt: skip
TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=()),
        st.sampled_from("aAbBäÄßẞſΣσςＡａ１1_ -。，中文字「」かなカナｶﾅ한글々〇一𠀀𪜀𝒜e\u0301\ufb01\u0130"),
    ),
    max_size=60,
)


def plain_tokens(text: str) -> list[str]:
    """The tokens, character by character in plain Python."""
    found: list[str] = []
    in_word = False
    for c in text:
        alone = any(low <= ord(c) <= high for low, high in ALONE)
        narrow = chr(ord(c) - 0xFEE0) if "！" <= c <= "～" else c
        small = next((s for s in (narrow.casefold(), narrow.lower()) if len(s) == 1), narrow)
        if not (narrow.isalnum() or (ord(c) >= 0x20000 and alone)):
            in_word = False
        elif alone:
            found.append(c)
            in_word = False
        elif in_word:
            found[-1] += small
        else:
            found.append(small)
            in_word = True
    return found


def plain_shingles(text: str) -> set[tuple[str, ...]]:
    """The shingles as tuples of tokens, or of characters where these are as many as the words."""
    tokens = plain_tokens(text)
    alone = sum(any(low <= ord(t[0]) <= high for low, high in ALONE) for t in tokens)
    if alone and 2 * alone >= len(tokens):
        tokens = list("".join(tokens))
    size = min(5, len(tokens))
    return {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)} if tokens else set()


def two_sets(size: int, shared: int, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Two sets of hashes: of `size` in all, `shared` in both, the others by turns in one and the other."""
    rng = np.random.default_rng(seed)
    union = rng.integers(0, 1 << 64, size, dtype=np.uint64)
    rest = union[shared:]
    return np.concatenate([union[:shared], rest[::2]]), np.concatenate([union[:shared], rest[1::2]])


def sketches(size: int, shared: int, tries: int) -> NDArray[np.bool_]:
    """Where the sketches of two such sets agree, [tries, 128]."""
    bins = np.zeros((2, kernels.BINS), dtype=np.uint64)
    found = []
    for seed in range(tries):
        for hashes, values in zip(two_sets(size, shared, seed), bins, strict=True):
            kernels.fill(hashes, values)
        found.append(bins[0] == bins[1])
    return np.array(found)


@settings(deadline=None, max_examples=400)
@given(TEXTS)
@example("")
@example("Ｈｅｌｌｏ，世界 hello")
@example("\ud800字\udfff")
def test_tokens_are_those_of_a_plain_reading(text: str) -> None:
    tokens = plain_tokens(text)
    hashes = signature.grams(text, 1)
    assert len(hashes) == len(tokens)
    for token, value in zip(tokens, hashes.tolist(), strict=True):
        assert signature.grams(token, 1).tolist() == [value]
    assert len(set(hashes.tolist())) == len(set(tokens))


@settings(deadline=None, max_examples=200)
@given(TEXTS, st.integers(1, 13))
def test_grams_are_tokens_in_a_row(text: str, size: int) -> None:
    tokens = plain_tokens(text)
    rows = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    hashes = signature.grams(text, size).tolist()
    assert len(hashes) == len(rows)
    assert len(set(zip(rows, hashes, strict=True))) == len(set(rows)) == len(set(hashes))


@settings(deadline=None, max_examples=200)
@given(TEXTS, TEXTS)
def test_jaccard_is_that_of_the_plain_sets(one: str, other: str) -> None:
    a, b = plain_shingles(one), plain_shingles(other)
    found = signature.jaccard(signature.shingles(one), signature.shingles(other))
    assert found == len(a & b) / max(1, len(a | b))
    hashes = signature.shingles(one).tolist()
    assert hashes == sorted(set(hashes))


def test_width_case_and_punctuation_do_not_count_but_order_does() -> None:
    def same(one: str, other: str) -> bool:
        return signature.shingles(one).tolist() == signature.shingles(other).tolist()

    assert same("床前明月光，疑是地上霜。", "床前 明月光\n疑是地上霜")
    assert same("The quick Brown fox jumps", "the QUICK ｂｒｏｗｎ fox, jumps")
    assert not same("床前明月光", "光月明前床")
    assert not same("ab c d e f", "a bc d e f")
    assert len(signature.shingles("一二三四五六")) == 2
    assert len(signature.shingles("一 two three")) == 1
    assert len(signature.shingles("……!?")) == 0


def test_words_in_a_chinese_text_are_read_by_their_letters() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(40))
    one, other = (text[:20] + word + text[20:] for word in ("databases", "databasex"))
    assert signature.jaccard(signature.shingles(one), signature.shingles(other)) == 40 / 50
    assert len(signature.shingles("一二 three four")) == 7
    assert len(signature.shingles("一 two three")) == 1


@pytest.mark.parametrize("size", [1, 5, 20, 60, 150, 400, 3000])
@pytest.mark.parametrize("alike", [0.0, 0.3, 0.8])
def test_estimate_is_unbiased_for_short_and_long_texts(size: int, alike: float) -> None:
    shared, tries = int(size * alike), 300
    agree = sketches(size, shared, tries).mean(axis=1)
    exact = shared / size
    deviation = (max(exact * (1 - exact), 0.001) / kernels.BINS) ** 0.5
    assert abs(agree.mean() - exact) < 4 * deviation / tries**0.5 + 1e-9
    assert agree.std() < 1.2 * deviation + 1e-9


@pytest.mark.parametrize("size", [20, 40, 100, 500, 2000])
def test_alike_pairs_share_a_band(size: int) -> None:
    rows = signature.rows_for(0.8)
    bands = kernels.BINS // rows
    for alike, least in ((0.8, 0.97), (0.85, 0.995)):
        agree = sketches(size, round(size * alike), 1500)[:, : bands * rows].reshape(-1, bands, rows)
        assert agree.all(axis=2).any(axis=1).mean() >= least


def test_bands_follow_from_the_threshold() -> None:
    assert signature.rows_for(0.8) == 7
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
        rows = signature.rows_for(threshold)
        assert 1 - (1 - threshold**rows) ** (kernels.BINS // rows) >= signature.RECALL
        assert signature.sign(["a b c d e f"], threshold)[1].shape == (1, kernels.BINS // rows)


def test_a_batch_is_signed_as_its_texts_are() -> None:
    texts = [
        "",
        "山",
        "床前明月光，疑是地上霜。" * 3,
        "!?",
        "𠀀𠀁 plain English words in a row",
        "ab" * 500,
        "",
    ]
    signatures, bands = signature.sign(texts)
    for text, row, keys in zip(texts, signatures, bands, strict=True):
        alone, own_keys = signature.sign([text])
        assert alone[0].tolist() == row.tolist()
        assert own_keys[0].tolist() == keys.tolist()
        assert bool(keys.all()) == bool(keys.any()) == bool(plain_tokens(text))
    nothing, no_keys = signature.sign([])
    assert nothing.shape == (0, 128) and no_keys.shape == (0, 18)


def test_estimate_of_signatures_is_near_the_exact_jaccard() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳", k=400))]
    for _ in range(60):
        text = list(words[-1])
        text[rng.randrange(len(text))] = "改"
        words.append("".join(text))
    signatures, _ = signature.sign(words)
    sets = [signature.shingles(w) for w in words]
    errors = [
        signature.estimate(signatures[0], s) - signature.jaccard(sets[0], own)
        for s, own in zip(signatures, sets, strict=True)
    ]
    assert max(map(abs, errors)) < 0.15
    assert abs(float(np.mean(errors))) < 0.06


def test_jaccards_of_pairs_are_those_of_their_texts() -> None:
    rng = random.Random(1)
    texts = ["".join(rng.choices("甲乙丙", k=rng.randrange(40))) for _ in range(90)]
    pairs = np.array([rng.sample(range(90), 2) for _ in range(200)], dtype=np.uint32)
    asked: list[int] = []

    def text_of(documents: list[int]) -> list[str]:
        asked.append(len(documents))
        return [texts[d] for d in documents]

    exact = [signature.jaccard(signature.shingles(texts[a]), signature.shingles(texts[b])) for a, b in pairs]
    assert signature.jaccards(text_of, pairs).tolist() == exact  # type: ignore[arg-type]
    assert max(asked) <= 64


def test_shingles_of_a_text_change_with_one_character_only_around_it() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(100))
    sets = [signature.shingles(text[:i] + "x" + text[i + 1 :]) for i in range(10, 90)]
    for one, other in pairwise(sets):
        assert len(one) == len(other) == 96
        assert kernels.overlap(one, other) == 96 - 6
