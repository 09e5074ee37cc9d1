"""Rules about language: which one a text is in, traditional characters to simplified."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from microlm.core.records import Document
from microlm.text.rules import edited
from microlm.text.rules.profile import profile

MIN_EAST_ASIAN = (
    0.2  # of characters of East Asia and other words, for the text to be Chinese, Japanese or Korean
)
MIN_KANA = 0.05  # of Han and kana together, for Japanese
LETTERS_PER_WORD = 5
SEARCHED_CHARS, SAMPLE_CHARS = 3000, 300  # of the text, and of the words in it
MIN_PROBABILITY = 0.5

_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> str:
    """The ISO 639-1 code of the text's main language; "" if it is left open.

    Script decides on Chinese, Japanese and Korean; on the rest py3langid, by 300 letters of the middle.
    """
    found = profile(text)
    east_asian = found.han + found.kana + found.hangul
    others = found.words + found.letters / LETTERS_PER_WORD
    if not east_asian and not found.latin and not found.letters:
        return ""
    if east_asian >= MIN_EAST_ASIAN * (east_asian + others):
        if found.hangul > found.han + found.kana:
            return "ko"
        return "ja" if found.kana > MIN_KANA * (found.han + found.kana) else "zh"
    words = " ".join(_WORD.findall(_middle(text, SEARCHED_CHARS)))
    language, probability = _identifier()(_middle(words, SAMPLE_CHARS))
    return str(language) if probability >= MIN_PROBABILITY else ""


def _middle(text: str, size: int) -> str:
    start = max(0, (len(text) - size) // 2)
    return text[start : start + size]


@functools.cache
def _identifier() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return model.classify  # type: ignore[no-any-return]


def drop_language(document: Document, languages: frozenset[str]) -> tuple[Document, str | None]:
    """Drop a text of another language than these; one whose language is open stays."""
    language = language_of(document.text)
    return document, f"language_{language}" if language and language not in languages else None


def simplify(document: Document) -> tuple[Document, str | None]:
    """Traditional characters to simplified ones, by OpenCC's phrases."""
    if not profile(document.text).han:
        return document, None
    return edited(document, _converter()(document.text)), None


@functools.cache
def _converter() -> Callable[[str], str]:
    import opencc

    return opencc.OpenCC("t2s").convert  # type: ignore[no-any-return]
