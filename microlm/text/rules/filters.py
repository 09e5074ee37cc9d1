"""Rules that drop a text for what it is as a whole: too long or short, an advert, repetition, not language.

The shares are those of Gopher (Rae et al. 2021, arXiv:2112.11446, A.1), set anew for Chinese: of 57,897
documents of prose, statutes, verse and manuals the defaults drop one, a table of contents.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from microlm.core.records import Document
from microlm.text.corpus.cut import cut
from microlm.text.rules import edited
from microlm.text.rules.lines import any_of
from microlm.text.rules.profile import profile
from microlm.text.rules.repetition import is_varied, repetition

MIN_PHRASES = 3  # of advertising, or fewer in a short text
CHARS_PER_PHRASE = 40
AD_CHARS = 500  # at the beginning, which spare most texts the rest
MIN_LINES = 10  # for a share of lines to say something
MIN_SYMBOLS = 3
MIN_SEEN = 40  # characters, for a share of letters
MIN_TOKENS, MIN_TOKENS_TOP = 20, 50  # for runs of 10, and of 4, to say something


def drop_long(document: Document, max_chars: int) -> tuple[Document, str | None]:
    """Drop a text over the limit (before any rule has to walk it)."""
    return document, "too_long" if len(document.text) > max_chars else None


def cut_long(document: Document, max_chars: int) -> tuple[Document, str | None]:
    """Keep the beginning of a text over the limit, up to the end of a sentence."""
    if len(document.text) <= max_chars:
        return document, None
    return edited(document, next(iter(cut(document.text[: max_chars + 1], max_chars)), "")), None


def drop_short(document: Document, min_chars: int) -> tuple[Document, str | None]:
    """Drop a text with fewer characters than `min_chars`."""
    return document, "too_short" if len(document.text) < min_chars else None


def drop_ads(document: Document) -> tuple[Document, str | None]:
    """Drop a text that is little but the phrases of advertising."""
    text = document.text
    is_ad = _is_ad(text[:AD_CHARS]) and (len(text) <= AD_CHARS or _is_ad(text))
    return document, "ad_spam" if is_ad else None


def _is_ad(text: str) -> bool:
    phrases = len(_ads().findall(text))
    return phrases >= MIN_PHRASES and phrases * CHARS_PER_PHRASE >= len(text)


@functools.cache
def _ads() -> re.Pattern[str]:
    listed = (Path(__file__).parent / "ads.txt").read_text(encoding="utf-8").splitlines()
    return any_of(listed)


def drop_repetition(document: Document, max_repeated: float, max_top: float) -> tuple[Document, str | None]:
    """Drop a text that says the same again and again.

    `max_repeated` is the share of tokens in runs of 10 that stood there before, `max_top` of those in the
    run of 4 that is the most frequent.
    """
    if is_varied(document.text, max_repeated, max_top):
        return document, None
    found = repetition(document.text)
    is_repetition = (found.repeated > max_repeated and found.tokens >= MIN_TOKENS) or (
        found.top > max_top and found.tokens >= MIN_TOKENS_TOP
    )
    return document, "repetition" if is_repetition else None


def drop_symbols(
    document: Document, min_letters: float, max_symbols: float, max_bullets: float, max_ellipses: float
) -> tuple[Document, str | None]:
    """Drop a text that is not language: few letters, many # and …, lists or broken-off lines throughout.

    `min_letters` is a share of what is seen, `max_symbols` one of words (a Han character is one), the others
    are shares of lines.
    """
    text, found = document.text, profile(document.text)
    letters = found.han + found.kana + found.hangul + found.latin + found.letters
    seen = len(text) - found.spaces - found.breaks - found.odd_spaces
    symbols = found.hashes + found.ellipsis_marks
    is_list = found.lines >= MIN_LINES and (
        found.bullets > max_bullets * found.lines or found.ellipses > max_ellipses * found.lines
    )
    is_symbols = symbols > max(MIN_SYMBOLS, max_symbols * (letters - found.latin + found.words))
    is_code = seen >= MIN_SEEN and letters < min_letters * seen
    if is_code or is_symbols or is_list:
        return document, "symbols"
    return document, None
