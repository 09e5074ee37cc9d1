"""Rules about lines and spaces: links and boilerplate, overlong lines, one kind of white space."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from microlm.core.records import Document
from microlm.text.corpus.cut import cut
from microlm.text.rules import edited
from microlm.text.rules.profile import profile

MIN_SPACED = 8  # pairs of characters with a space between them
MIN_SPACED_SHARE = 0.5  # of all pairs of Chinese characters

_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323ff"
_SPACED = re.compile(f"(?<=[{_HAN}]) (?=[{_HAN}])")
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000\t]")
_RUN = re.compile(r"(?<=\S) {2,}")
_BLANKS = re.compile(r"\n{3,}")
_LINK = re.compile(
    r"^[ \t]*(?:"
    r"\[[^\[\]\n]{1,12}\]:[ \t]*\S.*"  # [1]: https://…, [#]: author: …
    r"|https?://\S+[ \t]*"
    r")$",
    re.MULTILINE,
)
_DATA = re.compile("[!-~]+")
_BOILERPLATE = re.compile(
    r"^[ \t]*(?:"
    r"(?:via|原文链接?|译者|校对|选题|责任编辑)[ \t]*[:：].{0,80}"
    r"|(?:作者|来源)[ \t]*[:：][ \t]*(?:\[|http|.{0,60}(?:选题|译者|校对|责任?编辑?)[ \t]*[:：]).{0,120}"
    r"|本文由.{0,200}(?:编译|翻译|发布|推出|授权).{0,80}"
    r"|(?:上一[篇页章]|下一[篇页章])(?:[ \t]*[:：|].{0,60})?"
    r"|.{0,20}(?:扫描二维码|扫码|关注).{0,12}公众号.{0,40}"
    r"|版权(?:声明|所有)(?![者人权]).{0,120}|copyright[ \t]*(?:©|\(c\)|\d).{0,80}"
    r"|.{0,6}(?:本站|本文|文章|图片|内容|素材).{0,12}(?:来自|来源于?|转载自)(?:互联网|网络).{0,40}"
    r"|(?:(?:点赞|收藏|评论|分享到?[:：]?|举报|打赏|转发|登录|注册|首页|返回顶部|阅读原文)[ \t|]*){2,12}"
    r"|(?:点赞|分享到?[:：]|举报|打赏|首页|返回顶部|阅读原文)[ \t]*"
    r"|(?:转载请注明出处|点击查看更多|阅读全文|相关阅读).{0,20}"
    r")$",
    re.MULTILINE | re.IGNORECASE,
)
_INSIDE = ("公众号", "网络", "互联网")
"""What the lines hold whose beginning the profile does not know; see `profile.OPENING`."""


def remove_links(document: Document) -> tuple[Document, str | None]:
    """Remove lines that are a link, and the footer of links of a Markdown text."""
    text = document.text
    if "http" not in text and "]:" not in text:
        return document, None
    return edited(document, _LINK.sub("", text)), None


def remove_boilerplate(document: Document) -> tuple[Document, str | None]:
    """Remove lines of navigation, copyright and sharing."""
    text, found = document.text, profile(document.text)
    if not (found.openings or found.odd_spaces or any(word in text for word in _INSIDE)):
        return document, None  # quicker than the pattern
    return edited(document, _BOILERPLATE.sub("", document.text)), None


def normalise_whitespace(document: Document) -> tuple[Document, str | None]:
    """One kind of space, no trailing ones, single ones inside a line, at most one blank line."""
    found = profile(document.text)
    if not found.untidy and not found.odd_spaces:
        return edited(document, document.text.strip()), None
    text = _RUN.sub(" ", _SPACES.sub(" ", document.text))
    lines = (line.rstrip() for line in text.split("\n"))
    return edited(document, _BLANKS.sub("\n\n", "\n".join(lines)).strip()), None


def join_spaced(document: Document) -> tuple[Document, str | None]:
    """今 天 天 气 → 今天天气, where most neighbours of a text stand apart."""
    found = profile(document.text)
    if found.spaced < MIN_SPACED or found.spaced < MIN_SPACED_SHARE * (found.spaced + found.adjacent):
        return document, None
    return edited(document, _SPACED.sub("", document.text)), None


def break_lines(document: Document, max_chars: int) -> tuple[Document, str | None]:
    """Break lines over the limit where a sentence ends."""
    if profile(document.text).longest_line <= max_chars:
        return document, None
    pieces = (piece for line in document.text.split("\n") for piece in cut(line, max_chars) or [""])
    return edited(document, "\n".join(pieces)), None


def remove_data(document: Document, max_chars: int) -> tuple[Document, str | None]:
    """Remove words of ASCII over the limit: pictures and archives as text, minified code."""
    if profile(document.text).longest_word <= max_chars:
        return document, None
    text = _DATA.sub(lambda m: m[0] if len(m[0]) <= max_chars else "", document.text)
    return edited(document, text), None


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern of literal words, the longest that fits."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))


def put_in_place(
    document: Document, pattern: re.Pattern[str], pairs: Mapping[str, str]
) -> tuple[Document, str | None]:
    """Put the value of each key in its place, in one pass."""
    return edited(document, pattern.sub(lambda m: pairs[m[0]], document.text)), None
