"""Our cuts = those of `tokenizers`, for every pattern and policy, on text chosen to be awkward."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from microlm.text.bpe import pieces
from microlm.text.bpe.pieces import Pieces

RULES = [
    Pieces(pattern, digits, space, han)
    for pattern, digits, space, han in itertools.product(
        ("gpt2", "gpt4", "qwen"), ("runs", "single", "triples"), ("runs", "single"), (False, True)
    )
]
AWKWARD = (
    "aZsStTrReEvVmMlLdDſK'’\"  \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u3000\u200b0123456789²½Ⅷ"
    "〇一二中文，。！,.-_éßﬁ\u0301😀👍🏽"
)
TEXTS = st.text(st.one_of(st.sampled_from(AWKWARD), st.characters(exclude_categories=["Cs"])), max_size=40)


def ours(text: str, rule: pieces.Rule) -> list[str]:
    codes, _ = pieces.code_points([text])
    table, found, start, stop = pieces.classes(), [], 0, 0
    while start < len(text):
        if start >= stop:
            stop = pieces.segment_end(codes, start, len(text), table, rule)
        end = pieces.piece_end(codes, start, stop, table, rule)
        found.append(text[start:end])
        start = end
    return found


def theirs(text: str, rule: Pieces) -> list[str]:
    return [text[a:b] for _, (a, b) in rule.pre_tokenizer().pre_tokenize_str(text)]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.pattern}-{r.digits}-{r.whitespace}-{r.han_alone}")
@given(text=TEXTS)
@settings(max_examples=150)
def test_a_text_is_cut_where_tokenizers_cuts_it(rule: Pieces, text: str) -> None:
    assert ours(text, rule.rule()) == [p for p in theirs(text, rule) if p]


@pytest.mark.parametrize(
    ("regex", "bit"),
    [(r"\P{L}", pieces.LETTER), (r"\P{N}", pieces.NUMBER), (r"\S", pieces.SPACE), (r"\D", pieces.DIGIT)],
)
def test_every_character_has_the_class_that_tokenizers_gives_it(regex: str, bit: int) -> None:
    every = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    expected = np.zeros(0x110000, dtype=bool)
    split = pre_tokenizers.Split(Regex(regex), "removed")
    for _, (first, last) in split.pre_tokenize_str("".join(map(chr, every))):
        expected[every[first:last]] = True
    assert np.array_equal((pieces.classes() & bit) > 0, expected)
