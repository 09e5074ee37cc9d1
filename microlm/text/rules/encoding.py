"""Rules about characters: broken encodings, what is invisible, full-width letters, Unicode's normal form."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from microlm.core.records import Document
from microlm.text.rules import edited
from microlm.text.rules.profile import profile

MAX_LOST = 0.01  # share of U+FFFD, by which a text misses characters
MAX_BROKEN = 0.05  # share of U+FFFD, C1 controls and private use, which no text holds
MAX_UNREAD = 0.2  # share of U+FFFD in a line of which the rest is read anew
SHORT_CHARS = 200  # shorter texts may lack the characters that tell of mojibake
PROBE_CHARS = 40
MAX_MARKS = 30

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufff9-\ufffb\ue000-\uf8ff]"
    # joiners mean something inside Arabic, Indic and emoji sequences only
    "|[\u200c\u200d](?![\u0600-\u06ff\u0900-\u0dff\u2600-\u27bf\U0001f000-\U0001faff])"
)
_LINE_BREAK = re.compile("\r\n?|[\x0c\x85\u2028\u2029]")
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ue000-\uf8ff]"
)
_MARK_RUN = re.compile(  # all but the blocks without marks, so that most texts are walked quickly
    "[^\x00-\u02ff\u1100-\u135c\u2000-\u20cf\u2100-\u2ce0\u3000-\u3029\u3030-\u3098\u309b-\ua66e"
    "\uac00-\ud7ff\uff00-\uff9d]{31,}"
)
_LOST = re.compile("\ufffd+")
_WIDE = {0xFF01 + i: 0x21 + i for i in range(94)}  # ！ to ～
_CHINESE_MARKS = "，．：；！？（）［］｛｝～＂＇"  # full-width on purpose
_TO_ASCII = {wide: plain for wide, plain in _WIDE.items() if chr(wide) not in _CHINESE_MARKS}
_WIDE_DOT = re.compile("(?<=[0-9A-Za-z_])．(?=[0-9A-Za-z_])")


def repair_mojibake(document: Document) -> tuple[Document, str | None]:
    """Read anew, line by line, what was UTF-8 and was read as Latin-1, Windows-1252 or GBK."""
    text = document.text
    found = profile(text)
    if found.mojibake:
        text = "\n".join(map(_from_latin, text.split("\n")))
    if found.garbled or (found.han and len(text) < SHORT_CHARS and _begins_as_utf8(text)):
        text = "\n".join(map(_from_gbk, text.split("\n")))
    return edited(document, text), None


def _from_latin(line: str) -> str:
    import ftfy

    return str(ftfy.fix_encoding(line))


def _begins_as_utf8(text: str) -> bool:
    """Whether the GBK bytes of the first characters are UTF-8, but for what is cut off."""
    raw = text[:PROBE_CHARS].partition("\ufffd")[0].encode("gb18030", "replace")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as e:
        return e.start > max(0, len(raw) - 4)
    return True


def _from_gbk(line: str) -> str:
    """The line's GBK bytes as UTF-8, if that makes East Asian text of most of it, else the line.

    What was lost on the way stays U+FFFD, and `drop_broken` decides on it.
    """
    if line.isascii():
        return line
    raw = b"\xff".join(part.encode("gb18030", "replace") for part in line.split("\ufffd"))
    found = _LOST.sub("\ufffd", raw.decode("utf-8", "replace"))
    lost = found.count("\ufffd")
    if lost > MAX_UNREAD * len(found):
        return line
    meant = sum("\u2e80" <= c <= "\uffef" for c in found) - lost
    foreign = sum("\x80" <= c < "\u2000" for c in found)
    return found if meant > max(3 * lost, 2 * foreign, 3) else line


def drop_broken(document: Document) -> tuple[Document, str | None]:
    """Drop a text of the wrong encoding: rich in U+FFFD, C1 controls, private use or 锟斤拷."""
    found = profile(document.text)
    lost = found.lost + (3 * document.text.count("锟斤拷") if found.han else 0)
    broken, size = lost + found.private, len(document.text)
    is_broken = (lost > 3 and lost > MAX_LOST * size) or (broken > 3 and broken > MAX_BROKEN * size)
    return document, "broken_encoding" if is_broken else None


def remove_control(document: Document) -> tuple[Document, str | None]:
    """Remove control, zero-width and private-use characters and terminal colours; line ends become \\n."""
    found = profile(document.text)
    if not found.control and not found.private:
        return document, None
    return edited(document, visible(document.text)), None


def visible(text: str) -> str:
    """The text without control and invisible characters."""
    if not _UNSEEN.search(text):
        return text
    return _INVISIBLE.sub("", _LINE_BREAK.sub("\n", _ANSI.sub("", text)))


def fold_fullwidth(document: Document) -> tuple[Document, str | None]:
    """Full-width letters, digits and signs to ASCII (ＳＱＬ＋１ → SQL+1); Chinese punctuation stays."""
    if not profile(document.text).wide:
        return document, None
    return edited(document, _WIDE_DOT.sub(".", document.text.translate(_TO_ASCII))), None


def normalise_unicode(document: Document) -> tuple[Document, str | None]:
    """NFC: one way to write each character."""
    if not profile(document.text).unsettled:
        return document, None
    return edited(document, normalised("NFC", document.text)), None


def normalised(form: Literal["NFC", "NFKC"], text: str) -> str:
    """A Unicode normal form in linear time: of the marks stacked on a character the first 30 are kept.

    `unicodedata.normalize` sorts marks in quadratic time; 30 is the limit of UAX #15 (Stream-Safe Text).
    """
    return unicodedata.normalize(form, _MARK_RUN.sub(_first_marks, text) if _MARK_RUN.search(text) else text)


def _first_marks(run: re.Match[str]) -> str:
    kept = []
    stacked = 0
    for char in run[0]:
        stacked = stacked + 1 if unicodedata.combining(char) or char in "\uff9e\uff9f" else 0
        if stacked <= MAX_MARKS:
            kept.append(char)
    return "".join(kept)
