"""Exact duplicates: which texts are equal, and a digest set that is a set."""

from __future__ import annotations

import hashlib
import tracemalloc
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from microlm.core.records import Conversation, Document, Extraction, Message, Preference
from microlm.text.dedup import DIGEST_BYTES, DigestSet, digest, fold, record_digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("李白，字太白。", "李白,字太白"),
        ("ＡＢＣ　１２３", "abc 123"),
        ("李白\n是 诗人", "李白是诗人"),
        ("《静夜思》", "〈静夜思〉"),
    ],
)
def test_width_case_space_and_punctuation_do_not_count(one: str, other: str) -> None:
    assert digest(one) == digest(other)


@pytest.mark.parametrize(("one", "other"), [("李白", "杜甫"), ("1+1", "1=1"), ("a<b", "a>b")])
def test_other_texts_differ(one: str, other: str) -> None:
    assert digest(one) != digest(other)


def test_digest_is_half_a_sha256_of_the_folded_text() -> None:
    assert digest("Ａ b。") == hashlib.sha256(b"ab").digest()[:DIGEST_BYTES]


@settings(deadline=None, max_examples=600)
@given(
    st.text(
        st.one_of(
            st.characters(exclude_categories=["Cs"]),
            st.sampled_from(
                "aÄßſΣς１℃①½…　。，·가각\u1100\u1161\u11a8\u0301\ufb01\u0130\uf900\uff9e\ue000ㄱㅏﾡￂｶ\0𠀀😀"
            ),
        ),
        max_size=12,
    )
)
@example("\u1100\u1161\u11a8 가\u11a8 e\u0301 か\u3099")
@example("ㄱㅏ ﾡￂ 가ﾨ ｶﾞ")
def test_digest_by_table_is_that_of_the_folded_text(text: str) -> None:
    assert digest(text) == hashlib.sha256(fold(text).encode()).digest()[:DIGEST_BYTES]


def test_every_character_between_others_is_folded_as_alone() -> None:
    for code in (c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cs", "Co", "Cn")):
        text = f"か{chr(code)}a"
        assert digest(text) == hashlib.sha256(fold(text).encode()).digest()[:DIGEST_BYTES], hex(code)


def test_turns_are_not_run_together() -> None:
    def talk(*contents: str) -> Conversation:
        return Conversation(tuple(Message("user", c) for c in contents))

    assert record_digest(talk("ab", "c")) != record_digest(talk("a", "bc"))
    assert record_digest(talk("a")) != record_digest(Conversation((Message("assistant", "a"),)))
    prompt = (Message("user", "a"),)
    assert record_digest(Preference(prompt, "b", "c")) != record_digest(Preference(prompt, "c", "b"))


def test_a_document_equals_the_extraction_record_of_its_text() -> None:
    assert record_digest(Document("李白是诗人。")) == record_digest(Extraction("1", "人物", "李白是诗人", ()))


@given(st.lists(st.integers(0, 5000)))
def test_digest_set_is_a_set(numbers: list[int]) -> None:
    ours, pythons = DigestSet(), set[bytes]()
    for n in numbers:
        key = hashlib.sha256(str(n % 700).encode()).digest()[:DIGEST_BYTES]
        assert (key in ours) == (key in pythons)
        assert ours.add(key) == (key not in pythons)
        pythons.add(key)
    assert len(ours) == len(pythons)


def test_digest_set_takes_at_most_forty_bytes_a_digest() -> None:
    keys = [hashlib.sha256(str(i).encode()).digest()[:DIGEST_BYTES] for i in range(6_000)]
    tracemalloc.start()
    held = DigestSet()
    for key in keys:
        held.add(key)
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(held) == 6_000 and all(key in held for key in keys)
    assert current < 40 * len(keys)
