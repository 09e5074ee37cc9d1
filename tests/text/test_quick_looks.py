"""What spares a rule or a search most of its work changes no result."""

from __future__ import annotations

import random
import threading
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from shared_data import raw_lines

from microlm.core.records import Document
from microlm.text.clean import _difference
from microlm.text.corpus import contaminate
from microlm.text.corpus.pool import open_pool
from microlm.text.corpus.shared import hash_lines, without
from microlm.text.near import kernels
from microlm.text.near.signature import grams
from microlm.text.read import parse_json
from microlm.text.rules import encoding, lines
from microlm.text.rules.profile import SETTLED, class_table, profile
from microlm.text.rules.repetition import is_varied, repetition

BOILERPLATE = [
    *(
        "via: 某站",
        "原文链接：http://a.b",
        "  译者：某甲",
        "校对: 乙",
        "选题：丙",
        "责任编辑：丁",
        "作者：[戊",
    ),
    *(
        "来源: http://c.d",
        "本文由某社编译发布",
        "上一篇：春",
        "下一页",
        "扫描二维码关注公众号",
        "版权所有 2020",
    ),
    *(
        "欢迎关注我们的公众号",
        "版权声明",
        "评论 收藏",
        "Copyright © 2020 A",
        "COPYRIGHT 2021",
        "图片来源于网络",
    ),
    *(
        "本站内容来自互联网",
        "文章转载自网络，侵删",
        "点赞 收藏 评论",
        "分享到：",
        "举报",
        "打赏",
        "转发|登录",
    ),
    *(
        "登录 注册",
        "首页",
        "返回顶部 | 首页",
        "阅读原文",
        "转载请注明出处",
        "点击查看更多",
        "阅读全文",
        "相关阅读",
    ),
    *("Via：x", "VIA: y", "vıa: z", "收藏 分享", "注册 登录", "译者: 己", "评论|举报", "打赏 评论"),
]
OTHERS = [
    "本文介绍某事",
    "作者说得好",
    "春天的河水涨了",
    "a",
    "",
    " ",
    "，首页",
    "网络",
    "e\u0301 か\u3099 \u1100\u1161",
    "Å ﬁ ①",
]
LINES = [*BOILERPLATE, "\t版权所有", "\u3000首页", *OTHERS]
text_of_lines = st.lists(st.sampled_from(LINES), max_size=6).map("\n".join)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def check_rules(text: str) -> None:
    document = Document(text)
    assert lines.remove_boilerplate(document)[0].text == lines._BOILERPLATE.sub("", text)
    assert encoding.normalise_unicode(document)[0].text == encoding.normalised("NFC", text)


@given(st.one_of(text_of_lines, any_text))
@example("\n".join(LINES))
def test_a_rule_does_what_its_pattern_does(text: str) -> None:
    check_rules(text)


def test_each_line_of_boilerplate_is_seen() -> None:
    for line in (*BOILERPLATE, "\t版权所有"):
        assert lines.remove_boilerplate(Document(f"春天\n{line}\n秋天"))[0].text == "春天\n\n秋天", line


@pytest.mark.shared
@pytest.mark.slow
def test_rules_do_what_their_patterns_do_on_real_text() -> None:
    for number, line in zip(range(6000), raw_lines("pretrain.jsonl.zst"), strict=False):
        text = parse_json(line)["text"]
        check_rules(text)
        if number % 4 == 0 and is_varied(text, 0.3, 0.2):
            found = repetition(text)
            assert found.repeated <= 0.3 and found.top <= 0.2


def test_no_character_of_a_settled_block_moves_another() -> None:
    settled = [c for span in SETTLED.split() for c in span_of(span)]
    assert all(unicodedata.combining(chr(c)) == 0 for c in settled)
    for code in settled:  # behind a letter that joins with whatever can be joined
        if profile(chr(code)).unsettled == 0:
            text = f"a{chr(code)}か가"
            assert unicodedata.is_normalized("NFC", text), hex(code)
    assert class_table().dtype == np.uint16


def span_of(span: str) -> range:
    first, _, last = span.partition("-")
    return range(int(first, 16), int(last or first, 16) + 1)


@given(
    st.lists(st.sampled_from(["春天", "the ", "old boat ", "。", "灯火渐渐", "x"]), max_size=80).map("".join),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
)
def test_a_varied_text_is_below_both_limits(text: str, repeated: float, top: float) -> None:
    if is_varied(text, repeated, top):
        found = repetition(text)
        assert found.repeated <= repeated and found.top <= top


def test_prose_is_varied_and_a_refrain_is_not() -> None:
    rng = random.Random(1)
    prose = "".join(rng.choices([chr(c) for c in range(0x4E00, 0x5200)], k=1000))
    assert is_varied(prose, 0.85, 0.6) and not is_varied(prose[:50] * 20, 0.85, 0.6)


@given(st.lists(any_text, max_size=5))
def test_bytes_are_read_as_their_code_points(texts: list[str]) -> None:
    coded = [b"..", *(text.encode() for text in texts)]
    sizes = np.array([len(c) for c in coded])
    starts = np.cumsum(sizes) - sizes
    codes, ends = kernels.decode(np.frombuffer(bytearray(b"".join(coded)), np.uint8), starts[1:], sizes[1:])
    assert codes.tolist() == [ord(c) for text in texts for c in text]
    assert ends.tolist() == np.cumsum([len(text) for text in texts]).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_the_item_found_is_the_one_most_held(seed: int) -> None:
    rng = random.Random(seed)
    han = [chr(c) for c in range(0x4E00, 0x5200)]
    items = ["".join(rng.choices(han, k=rng.randint(14, 300))) for _ in range(30)]
    items += [item[: len(item) // 2] + "".join(rng.choices(han, k=40)) for item in items]  # share their grams
    held_out, _ = contaminate.gather(items, [], overlap=0.25)
    samples = [
        set(np.unique(grams(item, contaminate.TOKENS))[: contaminate.SAMPLE].tolist()) for item in items
    ]
    found = []
    for _ in range(200):
        some = rng.sample(items, 2)
        text = "".join(i[rng.randint(0, len(i) // 2) :][: rng.randint(5, 200)] for i in some) * rng.randint(
            1, 2
        )
        seen = set(grams(text, contaminate.TOKENS).tolist())
        shares = [len(seen & sample) / len(sample) for sample in samples]
        best = max(range(len(items)), key=lambda n: (shares[n], -n))
        found.append(held_out.found_in(text))
        assert found[-1] == (best if shares[best] >= 0.25 else None)
    assert None in found and len(set(found)) > 10


@given(text_of_lines, st.data())
def test_lines_go_by_their_places(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    whole = np.frombuffer(bytearray(b"__" + raw), np.uint8)
    _, _, places = hash_lines(whole, np.array([2]), np.array([len(raw)]))
    places = places - 2
    assert [raw[p:].partition(b"\n")[0].decode() for p in places] == [
        line for line in text.split("\n") if 10 <= len(line.strip(" ")) <= 400
    ]
    gone = [p for p in places.tolist() if data.draw(st.booleans())]
    ends = np.cumsum([0, *(len(line.encode()) + 1 for line in text.split("\n"))]).tolist()
    kept = [line for line, start in zip(text.split("\n"), ends, strict=False) if start not in gone]
    assert without(raw, gone) == "\n".join(kept).strip()


def test_an_example_shows_where_texts_part_and_nobody() -> None:
    before = "春" * 5000 + " 电话 13812345678 。" + "秋" * 5000
    shown = _difference(before, before.replace("电话", "電話"))
    assert "电话 <电话号码> 。秋" in shown and "電話 <电话号码> 。秋" in shown and len(shown) < 120
    assert "13812345678" not in _difference(before, before.replace("138", "139"))


READY: list[int] = []


def is_ready(_: int) -> bool:
    return bool(READY)


def test_workers_are_forked_warm_unless_another_thread_runs() -> None:
    alone = threading.active_count() == 1
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    try:
        with open_pool(2, lambda: READY.append(1)) as pool:
            assert list(pool.map(is_ready, range(4))) == [alone] * 4
        READY.clear()
        thread.start()
        with open_pool(2, lambda: READY.append(1)) as pool:
            assert not any(pool.map(is_ready, range(4))) and not READY
    finally:
        waiting.set()
        READY.clear()
