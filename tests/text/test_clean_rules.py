"""Rules of cleaning one by one: what each repairs, masks, drops, and what it leaves alone."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlm.core.errors import UserError
from microlm.core.recipe import build
from microlm.core.records import Document
from microlm.text.clean import CleanRecipe, Effects, clean, glimpse, rules
from microlm.text.rules.language import language_of
from microlm.text.rules.privacy import is_card_number, is_id_number
from microlm.text.rules.profile import profile
from microlm.text.rules.repetition import repetition

PROSE = "毛公注《生民》诗，说姜嫄生后稷，后人多有不同的说法。"
ESSAY = (
    "天下之事，有所激有所逼而成者，往往出于意料之外。春天的河水涨了，渡口的老船夫把缆绳又系紧一圈；"
    "他的孙女坐在门槛上，数着对岸的灯火。远处传来磨坊的声响，夜色渐渐漫过了屋檐，谁也没有再说话。"
)
ENGLISH = "The river rose in spring and the old ferryman tied his boat more tightly to the landing stage."


def after(text: str, **options: object) -> tuple[str, str | None]:
    recipe = build(CleanRecipe, {"min_chars": 0, **options}, "clean")
    document, reason = clean(Document(text, "f:1"), rules(recipe), Effects())
    return document.text, reason


def read_as(text: str, encoding: str) -> str:
    return text.encode().decode(encoding, "replace")


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        (read_as(ESSAY, "latin-1"), ESSAY),
        (f"{ESSAY}\n{read_as(PROSE, 'latin-1')}", f"{ESSAY}\n{PROSE}"),
        ("Microsoft® SQL Server® 与 café", "Microsoft® SQL Server® 与 café"),
        ("字符为“Ã”，而不是“æ”。", "字符为“Ã”，而不是“æ”。"),
        (read_as("你好世界", "gb18030"), "你好世界"),
        (f"{ESSAY}\n{read_as('河水涨了，夜色更深了', 'gb18030')}", f"{ESSAY}\n河水涨了，夜色更深了"),
        ("联通公司的工程师说，锟斤拷是乱码。", "联通公司的工程师说，锟斤拷是乱码。"),
    ],
)
def test_mojibake_is_read_anew(dirty: str, expected: str) -> None:
    assert after(dirty) == (expected, None)


@pytest.mark.parametrize(
    "dirty",
    [
        read_as(ESSAY, "gb18030"),
        ESSAY.encode("gb18030").decode("utf-8", "replace"),
        "锟斤拷锟斤拷" * 5,
        "\x81\x82" * 20,
    ],
)
def test_what_cannot_be_read_anew_is_dropped(dirty: str) -> None:
    assert after(dirty)[1] == "broken_encoding"


@given(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=1, max_size=150))
def test_chinese_text_is_never_mistaken_for_mojibake(text: str) -> None:
    assert after(text, max_top_run=1) == (text, None) or repetition(text).repeated > 0.85


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("ＳＱＬ Ｓｅｒｖｅｒ ２０１６，是（数据库）！", "SQL Server 2016，是（数据库）！"),
        ("ａｂｃ．ｐｙ ＋１．", "abc.py +1．"),
        ("你好，世界！（一）", "你好，世界！（一）"),
        ("今 天 天 气 很 好，我 们 去 看 PHP 的 书。", "今天天气很好，我们去看 PHP 的书。"),
        (f"{PROSE}甲 乙 丙 丁", f"{PROSE}甲 乙 丙 丁"),
        ("---\ntitle: 诗\ntags:\n  - a\n- b\n---\n正文在此。", "正文在此。"),
        ("---\n这是一条线。\n---\n正文在此。", "---\n这是一条线。\n---\n正文在此。"),
        ("---\n---\n正文在此。", "---\n---\n正文在此。"),
        ("正文在此。\n\n[1]: https://a.b/c\n[2]:http://d.e", "正文在此。"),
        ("产地：阿国\n作者：帕德洛", "产地：阿国\n作者：帕德洛"),
        ("正文。\n作者：[王][a] 译者：[李](b) 校对：[张](c)\nvia: http://a.b", "正文。"),
        ("登录\n所选的账户。", "登录\n所选的账户。"),
        ("图：data:image/png;base64," + "iVBORw0KGgo" * 300 + " 完", "图： 完"),
    ],
)
def test_edits(dirty: str, expected: str) -> None:
    assert after(dirty) == (expected, None)


def test_replacements_are_literal_and_made_once() -> None:
    pairs = {"a.b": "c", "a": "aa", "李白": "李太白"}
    assert after("a.b a axb 李白", replace=pairs)[0] == "c aa aaxb 李太白"
    with pytest.raises(UserError, match="clean: replace"):
        after("a", replace={"": "b"})


def test_long_documents_are_dropped_or_cut_at_a_sentence() -> None:
    assert after(ESSAY, max_chars=60)[1] == "too_long"
    kept, reason = after(ESSAY, max_chars=60, too_long="cut")
    assert reason is None and len(kept) <= 60 and ESSAY.startswith(kept) and kept[-1] in "。；"


def test_long_lines_are_broken_and_lose_nothing() -> None:
    flat = "".join(f"第{i}句话说的是第{i * 7 % 101}件事。" for i in range(2000))
    text, reason = after(flat, max_line_chars=1000, max_repeated=1)
    assert reason is None and text.replace("\n", "") == flat
    assert max(map(len, text.split("\n"))) <= 1000
    assert all(line.endswith("。") for line in text.split("\n"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("代开发票 13800000000 加微信号 xx888 领取优惠券 澳门皇冠线上注册送88元", "ad_spam"),
        (f"{ESSAY}禁止代开发票。", None),
        (PROSE * 12, "repetition"),
        ("Ubuntu\n" * 35, "repetition"),
        (
            "".join(f"{c}搬家公司 " for c in "京沪津渝冀晋辽吉黑苏浙皖闽赣鲁豫鄂湘粤琼川贵云陕甘青"),
            "repetition",
        ),
        (ESSAY * 2, None),
        (
            "Lapon syndrome: its cause heat.\ncause\nLapon syndrome: its cause heat.",
            None,
        ),
        ("1|2|3|4|5|6|7\n" * 3 + "(8) 9.5 + 10 = 19.5", "symbols"),
        ("# 诗 #唐 #宋 #元 #明 #清 #诗 #词 #曲", "symbols"),
        ("\n".join(f"- 第{c}条说的事{c}" for c in "一二三四五六七八九十甲乙"), "symbols"),
        ("\n".join(f"第{c}条的开头是这样{c}的……" for c in "一二三四五六七八九十甲乙"), "symbols"),
        ("# 标题\n## 小标题\n" + ESSAY, None),
    ],
)
def test_what_is_no_text_is_dropped(text: str, reason: str | None) -> None:
    assert after(text)[1] == reason


def test_each_limit_is_an_option() -> None:
    assert after(PROSE * 12, max_repeated=1)[1] is None
    assert after("代开发票 加微信号 领取优惠券", drop_ads=False)[1] is None
    assert after("1|2|3|4|5|6|7|8" * 5, min_letters=0, max_top_run=1, max_repeated=1)[1] is None


def test_repetition_is_the_share_of_runs_that_stood_there_before() -> None:
    assert repetition(ESSAY).repeated == 0
    once = repetition(ESSAY).tokens
    assert repetition(ESSAY * 4) == (4 * once, 0.75, 16 / (4 * once))
    assert repetition("one two three four " * 5).tokens == 20


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (PROSE, "zh"),
        (ENGLISH, "en"),
        ("推銷員之死，劇作家亞瑟·米勒的劇本。", "zh"),
        ("これは日本語の文章です。東京は大都市である。", "ja"),
        ("이것은 한국어 문장입니다.", "ko"),
        ("Это предложение написано на русском языке, и оно довольно длинное.", "ru"),
        ("在 Linux 上用 apt-get install python3 安装 Python 的方法", "zh"),
        ("12345 + 678 = 9", ""),
        ("", ""),
    ],
)
def test_language(text: str, language: str) -> None:
    assert language_of(text) == language


def test_only_the_named_languages_are_kept() -> None:
    assert after(ENGLISH)[1] is None
    assert after(ENGLISH, languages=["zh"])[1] == "language_en"
    assert after(ENGLISH, languages=["zh", "en"])[1] is None
    assert after("abc 123 后 45", languages=["zh"])[1] is None
    with pytest.raises(UserError, match="languages"):
        after(ENGLISH, languages=["Chinese"])


def test_traditional_becomes_simplified_by_phrases() -> None:
    assert after("後漢書說皇后的頭髮，乾隆與乾燥", simplify=True)[0] == "后汉书说皇后的头发，乾隆与干燥"


def test_check_digits() -> None:
    assert is_id_number("11010519491231002X") and not is_id_number("110105194912310021")
    assert is_card_number("4539 1488 0343 6467") and not is_card_number("4539148803436468")


@pytest.mark.parametrize(
    ("text", "expected", "rule"),
    [
        ("他是11010519491231002X。", "他是<身份证号>。", "mask_id_numbers"),
        ("身份证号：110101199001010734", "身份证号：<身份证号>", "mask_id_numbers"),
        ("序号110101199001010734", "序号110101199001010734", None),
        ("卡 4539 1488 0343 6467 已付", "卡 <银行卡号> 已付", "mask_bank_cards"),
        ("银行卡号 6222562019564754", "银行卡号 <银行卡号>", "mask_bank_cards"),
        ("请拨13930304461或010-62345678。", "请拨<电话号码>或<电话号码>。", "mask_phones"),
        ("call +86 139 3030 4461 now", "call <PHONE> now", "mask_phones"),
        ("圆周率3.13930304461", "圆周率3.13930304461", None),
        ("邮箱：user36@mail.example.com。", "邮箱：<邮箱>。", "mask_emails"),
        ("服务器 192.168.80.50", "服务器 <IP地址>", "mask_ip_addresses"),
        (
            "本机 127.0.0.1，掩码 255.255.255.0，版本 1.2.3",
            "本机 127.0.0.1，掩码 255.255.255.0，版本 1.2.3",
            None,
        ),
        ("at 2400:3200::1 and std::a::b", "at <IP_ADDRESS> and std::a::b", "mask_ip_addresses"),
        ("QQ：420292586，微信号 abc_12345", "QQ：<账号>，微信号 <账号>", "mask_accounts"),
        ("微信 Android 版与 QQ 音乐", "微信 Android 版与 QQ 音乐", None),
    ],
)
def test_personal_data_is_masked_and_counted_by_kind(text: str, expected: str, rule: str | None) -> None:
    effects = Effects()
    document, _ = clean(
        Document(text), rules(CleanRecipe(mask_pii=True, min_chars=0, min_letters=0)), effects
    )
    assert document.text == expected
    assert effects.changed == ({rule: 1} if rule else {})
    assert after(text)[0] == text, "masking is an option"


def test_no_example_shows_personal_data() -> None:
    effects = Effects()
    text = "联系\u200b电话13930304461，<b>邮箱</b>a@b.cn，  卡4539148803436467。"
    document, _ = clean(Document(text), rules(CleanRecipe(mask_pii=True)), effects)
    shown = str(effects.examples) + glimpse(Document(text)) + glimpse(document)
    assert {"control_characters", "html", "whitespace", "mask_phones", "mask_emails"} <= set(effects.changed)
    assert "<电话号码>" in shown
    assert not any(secret in shown for secret in ("1393030", "a@b", "453914"))


def test_effects_of_parts_add_up() -> None:
    whole, first, second = Effects(), Effects(), Effects()
    for i in range(5):
        for effects in (whole, first if i < 2 else second):
            clean(Document(f"李白\u200b是诗人  。{i}", f"f:{i}"), rules(CleanRecipe(min_chars=0)), effects)
    first.add(second)
    assert first == whole == Effects.from_json(whole.to_json())


@given(st.text(max_size=200))
def test_the_profile_counts_every_character_once(text: str) -> None:
    found = profile(text)
    assert sum(found[:14]) == len(text)
    assert found.breaks == text.count("\n") and found.spaces == text.count(" ")
    assert found.longest_line == max(map(len, text.split("\n")))
    assert found.digits == sum(c in "0123456789" for c in text)


@pytest.mark.parametrize(
    "piece",
    [
        "---\na: b\n",
        "---\na: b\n---\n",
        "QQ",
        "1",
        "1.",
        "a@",
        "a.",
        "1:",
        "1 ",
        "今 ",
        "锟",
        "銆",
        "Ã\x80",
        "微信",
        "卡号",
        "…\n",
        "注册送",
    ],
)
def test_hostile_text_is_cleaned_in_linear_time(piece: str) -> None:
    steps = rules(CleanRecipe(mask_pii=True, languages=["zh"], simplify=True, min_letters=0, max_repeated=1))
    clean(Document(ENGLISH), steps, Effects())  # the first call loads models and kernels
    clean(Document(PROSE), steps, Effects())
    text = piece * (200_000 // len(piece))
    started = time.process_time()
    clean(Document(text), steps, Effects())
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("李白&#8203;是诗人&shy;。", "李白是诗人。"),
        ("李白是诗人。&#13;杜甫也是。&#x2028;王维也是。", "李白是诗人。\n杜甫也是。\n王维也是。"),
        ("<p>李白&zwj;是&lrm;诗人&#xFEFF;。</p>", "李白是诗人。"),
        ("x &lt; y &#128104;&zwj;&#128105;", "x < y \U0001f468\u200d\U0001f469"),
    ],
)
def test_entities_leave_nothing_invisible(text: str, expected: str) -> None:
    assert after(text) == (expected, None)
    effects = Effects()
    clean(Document(text), rules(CleanRecipe(min_chars=0, min_letters=0)), effects)
    assert effects.changed["html"] == 1
