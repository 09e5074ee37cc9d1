"""Rules about markup: YAML front matter, HTML and XML to text."""

from __future__ import annotations

import html
import re

from microlm.core.records import Document
from microlm.text.rules import edited
from microlm.text.rules.encoding import visible

MAX_FRONT_MATTER_LINES = 100

_BLOCK = (
    "address|article|aside|blockquote|body|br|caption|center|dd|div|dl|dt|fieldset|figcaption|figure|footer|"
    "form|h[1-6]|head|header|hr|html|li|main|nav|ol|p|pre|section|table|tbody|td|tfoot|th|thead|title|tr|ul"
)
_INLINE = (
    "a|abbr|b|big|button|cite|code|del|em|font|i|iframe|img|input|ins|kbd|label|link|meta|noscript|ref|s|"
    "samp|small|source|span|strike|strong|sub|sup|u|video"
)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCK})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_XML_TAG = re.compile(r"</?[A-Za-z][\w:.-]*(?:\s[^<>]*)?/?>|<[?!][^<>]*>")
_DECLARATION = re.compile(r"<(?:!doctype|\?xml)\b[^<>]*>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_XML_NAME = re.compile(r"&[A-Za-z][\w.-]{0,63};")
_HIDDEN = (("<!--", "-->"), ("<script", "</script>"), ("<style", "</style>"))
_BLANK = re.compile(r"\s*")
_YAML_LINE = re.compile(r"[ \t]*(?:$|#|-(?:[ \t]|$)|[\"']?[\w./-]{1,60}[\"']?[ \t]*:(?:[ \t]|$))|[ \t]+\S")


def remove_front_matter(document: Document) -> tuple[Document, str | None]:
    """Remove YAML between two lines of `---` at the beginning."""
    text, at = document.text, 0
    while end := _front_matter_end(text, at):
        at = end
    return edited(document, text[at:]), None


def _front_matter_end(text: str, at: int) -> int:
    """Where the front matter that begins at `at` ends; 0 if there is none."""
    start = _BLANK.match(text, at).end()  # type: ignore[union-attr]
    if not text.startswith("---\n", start):
        return 0
    first = at = start + 4
    for _ in range(MAX_FRONT_MATTER_LINES):
        stop = text.find("\n", at)
        line = text[at:] if stop < 0 else text[at:stop]
        if line.rstrip() in ("---", "..."):
            return (stop + 1 or len(text)) if at > first else 0
        if stop < 0 or not _YAML_LINE.match(line):
            return 0
        at = stop + 1
    return 0


def html_to_text(document: Document) -> tuple[Document, str | None]:
    """Tags and entities to text: block tags end a line, scripts, comments and invisible characters go.

    What is no tag, as `<T>` of code, stays.
    """
    text = document.text
    if "<" not in text and "&" not in text:
        return document, None
    is_xml = text.lstrip()[:5] == "<?xml"
    for start, end in _HIDDEN:
        text = _cut(text, start, end)
    text = _INLINE_TAG.sub("", _BLOCK_TAG.sub("\n", _DECLARATION.sub("", text)))
    if is_xml:
        text = _XML_NAME.sub(_known_entity, _XML_TAG.sub("", text))
    text = _ENTITY.sub(lambda m: html.unescape(m[0]), text)
    return (document if text == document.text else edited(document, visible(text))), None


def _known_entity(match: re.Match[str]) -> str:
    plain = html.unescape(match[0])
    return "" if plain == match[0] else plain


def _cut(text: str, start: str, end: str) -> str:
    """Without everything from `start` to `end`, in linear time; an opening that never ends stays."""
    if start not in text:
        return text
    kept = []
    at = 0
    while (found := text.find(start, at)) >= 0 and (close := text.find(end, found)) >= 0:
        kept.append(text[at:found])
        at = close + len(end)
    return "".join(kept) + text[at:]
