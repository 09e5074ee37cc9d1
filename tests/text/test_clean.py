"""Cleaning: each rule on an example drawn by hand, and laws that hold for any text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlm.core.records import Conversation, Document, Message
from microlm.text import clean as cleaning
from microlm.text.clean import CleanRecipe, Effects, clean, rules, tidy
from microlm.text.dedup import digest

SMALL = CleanRecipe(min_chars=4, max_chars=1000)
PROSE = "毛公注《生民》诗，说姜嫄生后稷，后人多有不同的说法。"


def cleaned(text: str) -> tuple[str, str | None]:
    document, reason = clean(Document(text, "f:1"), rules(SMALL), Effects())
    return document.text, reason


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("李\u200b白是\ufeff诗\x07人。", "李白是诗人。"),
        ("\x1b[31m李白\x1b[0m是诗人。", "李白是诗人。"),
        ("一行\r\n二行\r三行\u2028四行", "一行\n二行\n三行\n四行"),
        ("李白  是\u3000\u3000诗人。  \n\n\n\n他是唐朝人。", "李白 是 诗人。\n\n他是唐朝人。"),
        ("<p>李白&nbsp;是<b>诗人</b>。</p><br/>他是唐朝人", "李白 是诗人。\n\n他是唐朝人"),
        ("<script>var a = '<p>';</script>李白是诗人。<!-- 注 -->", "李白是诗人。"),
        ("<?xml version='1.0'?><para>李白&lt;701&gt;&foo;</para>", "李白<701>"),
        ("std::vector<int> 与 a < b && c > d", "std::vector<int> 与 a < b && c > d"),
        ("李白是诗人。\n[1]: https://example.com/x\nhttps://a.b/c", "李白是诗人。"),
        ("李白是诗人。\n上一篇：没有了\n点赞 收藏 评论 分享 举报", "李白是诗人。"),
        ("李白是诗人。\n本站所有文章均来自互联网，如有侵权请联系删除。", "李白是诗人。"),
        ("cafe\u0301 里的诗人", "café 里的诗人"),
        ("👩\u200d👩\u200d👧 一家三口", "👩\u200d👩\u200d👧 一家三口"),
        ("诗" + "\u0301" * 40 + "人与歌者", "诗" + "\u0301" * 30 + "人与歌者"),
        ("版权所有人应当自转让之日起登记。", "版权所有人应当自转让之日起登记。"),
        (PROSE.encode().decode("latin-1"), PROSE),
    ],
)
def test_edits(dirty: str, expected: str) -> None:
    assert cleaned(dirty) == (expected, None)


@pytest.mark.parametrize(
    ("dirty", "reason"),
    [
        ("好", "too_short"),
        ("<p></p> \u200b\u200b\u200b 好", "too_short"),
        ("文" * 1001, "too_long"),
        (PROSE * 12, "repetition"),
        (PROSE.encode("gbk").decode("utf-8", "replace"), "broken_encoding"),
        ("首页\n登录 注册", "too_short"),
    ],
)
def test_drops(dirty: str, reason: str) -> None:
    assert cleaned(dirty)[1] == reason


def test_ordinary_prose_is_untouched() -> None:
    text = PROSE + "\n第二段说的是另一件事，与前文无关。\n\n- 一条\n- 另一条"
    document = Document(text, "f:1")
    assert clean(document, rules(SMALL), Effects()) == (document, None)


@given(st.text(max_size=300))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    steps = rules(CleanRecipe(min_chars=0, max_chars=1000))
    once, reason = clean(Document(cleaning.visible(text)), steps, Effects())
    if reason is None and "&" not in text and "<" not in text:  # an entity may spell a new entity
        assert clean(once, steps, Effects()) == (once, None)


def test_effects_count_each_rule_with_three_examples() -> None:
    effects = Effects()
    for i in range(5):
        clean(Document(f"李白\u200b是诗人。{i}", f"f:{i}"), rules(SMALL), effects)
    assert effects.changed == {"control_characters": 5}
    assert [e.partition(": ")[0] for e in effects.examples["control_characters"]] == ["f:0", "f:1", "f:2"]


def test_conversations_lose_what_is_invisible_and_keep_their_tags() -> None:
    said = Conversation((Message("user", "<b>\u200b问</b>"), Message("assistant", "答\x07")))
    assert tidy(said) == Conversation((Message("user", "<b>问</b>"), Message("assistant", "答")))


@pytest.mark.parametrize(
    "piece",
    [
        "<!--",
        "<script",
        "<p ",
        "&a",
        "[1]: ",
        " ",
        "\t\n",
        "a ",
        "点赞",
        "关注",
        "\u0301",
        "\u05c1\u05bf",
        "\uff9e\u0301",
    ],
)
def test_hostile_text_is_cleaned_in_linear_time(piece: str) -> None:
    text = "-->" + piece * (400_000 // len(piece))
    started = time.process_time()
    document, _ = clean(Document(text), rules(CleanRecipe(min_chars=4)), Effects())
    digest(document.text)
    assert time.process_time() - started < 2
