"""What a text is made of, counted in one pass over its characters; the rules ask it before they work."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microlm.text.compiled import njit

OTHER, HAN, KANA, HANGUL, LATIN, LETTER, DIGIT, SPACE, BREAK, CONTROL, PRIVATE, LOST, WIDE, ODD_SPACE = range(
    14
)
RANGES = {
    HAN: "3005-3007 3400-4dbf 4e00-9fff f900-faff",
    KANA: "3041-3096 309d-309f 30a1-30fa 30fc-30ff 31f0-31ff ff66-ff9d",
    HANGUL: "1100-11ff 3131-318e ac00-d7a3",
    LATIN: "41-5a 61-7a aa b5 ba c0-d6 d8-f6 f8-24f 1e00-1eff",
    LETTER: "250-2af 370-373 376-377 37b-37d 386 388-481 48a-52f 531-556 561-587 5d0-5ea 620-64a 671-6d3"
    " 904-939 985-9b9 a05-a39 a85-ab9 b85-bb9 c05-c39 d05-d39 e01-e30 e81-eb0 f40-f6c 1000-102a 10a0-10ff"
    " 1200-1248 1780-17b3 1820-1878 1f00-1fff 2c00-2dff",
    DIGIT: "30-39",
    SPACE: "20",
    BREAK: "a",
    CONTROL: "0-8 b-1f 7f 85 ad 200b-200f 2028-202e 2060-206f feff fff9-fffb",
    PRIVATE: "80-84 86-9f e000-f8ff",
    LOST: "fffd",
    WIDE: "ff10-ff19 ff21-ff3a ff41-ff5a",
    ODD_SPACE: "9 a0 1680 2000-200a 202f 205f 3000",
}
"""Class → the code points it holds, in hexadecimal; what is not listed is OTHER."""

# marks on a class: what tells of mojibake, lists, broken-off lines, boilerplate, of what NFC changes
GARBLED, LEAD, TRAIL, BULLET, ELLIPSIS, HASH = 16, 32, 64, 128, 256, 512
SEEN, OPENING, SECOND, UNSETTLED = 1024, 2048, 4096, 8192
MARKS = {
    # the characters that Chinese in UTF-8 makes most often when it is read as GBK, and no text else holds
    GARBLED: "锛紝銆鐨殑鍙鏈屽鍒鍏鐢鍚鍦敤勫鎴鏄屾鏂傛竴鏉鍗勬佸鏃鍔",
    LEAD: "".join(map(chr, range(0xC2, 0xF5))),
    TRAIL: "".join(map(chr, range(0x80, 0xC0))) + "€‚ƒ„†‡ˆ‰Š‹ŒŽ˜™š›œžŸ",
    BULLET: "•‣▪●○■□◆◇★☆▶►▸·-*+",
    ELLIPSIS: "…",
    HASH: "#",
    # the first two characters of the lines of `lines.remove_boilerplate` that begin with certain words
    OPENING: "vV原译校选责作来本上下版cC点收评分举打转登注首返阅相",
    SECOND: "iIıİ文者对题任源一权oO赞藏论享报赏发载录册页回读击关",
}
SETTLED = "0-2ff 1200-135c 2000-20cf 2100-2ce0 3000-3029 3030-3098 309b-a66e ac00-d7a3 e000-f8ff ff00-ff9d"
"""Blocks without marks: NFC leaves their characters as they are, but for those that it replaces."""


class Profile(NamedTuple):
    """Counts of a text, in characters unless said otherwise."""

    other: int
    han: int
    kana: int
    hangul: int
    latin: int
    letters: int  # of other scripts
    digits: int
    spaces: int
    breaks: int
    control: int
    private: int
    lost: int  # U+FFFD
    wide: int  # full-width letters and digits
    odd_spaces: int
    words: int  # runs of letters and digits that are not of East Asia
    longest_word: int  # run without a space, of whatever is not of East Asia
    longest_line: int
    lines: int  # that are not blank
    bullets: int  # lines that begin with one
    ellipses: int  # lines that end in one
    hashes: int  # inside lines
    ellipsis_marks: int
    garbled: int
    mojibake: int  # pairs that UTF-8 makes when it is read as Latin-1
    spaced: int  # Han, space, Han
    adjacent: int  # Han, Han
    untidy: int  # spaces and blank lines that normalising would change
    openings: int  # of lines, as boilerplate has them
    unsettled: int  # characters that NFC may change


@functools.lru_cache(maxsize=1)
def profile(text: str) -> Profile:
    """Count the text; the last answer is kept, for rule after rule asks the same."""
    return Profile(*_count(code_points(text), class_table()).tolist())


@functools.lru_cache(maxsize=1)
def code_points(text: str) -> NDArray[np.uint32]:
    """The characters of the text as numbers; the last answer is kept."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


@functools.cache
def class_table() -> NDArray[np.uint16]:
    """Class and marks of each code point of the first plane."""
    table = np.zeros(65536, dtype=np.uint16)
    for number, ranges in RANGES.items():
        for low, high in _spans(ranges):
            table[low:high] = number
    for mark, chars in MARKS.items():
        table[[ord(c) for c in chars]] |= mark
    table |= UNSETTLED
    for low, high in _spans(SETTLED):
        table[low:high] &= ~np.uint16(UNSETTLED)
        if not unicodedata.is_normalized("NFC", chars := "".join(map(chr, range(low, high)))):
            table[[ord(c) for c in chars if not unicodedata.is_normalized("NFC", c)]] |= UNSETTLED
    return table


def _spans(ranges: str) -> Iterator[tuple[int, int]]:
    for span in ranges.split():
        first, _, last = span.partition("-")
        yield int(first, 16), int(last or first, 16) + 1


@njit
def _count(points: NDArray[np.uint32], table: NDArray[np.uint16]) -> NDArray[np.int64]:
    counts = np.zeros(29, dtype=np.int64)
    words = longest_word = longest_line = lines = bullets = ellipses = hashes = ellipsis_marks = 0
    garbled = mojibake = spaced = adjacent = untidy = openings = unsettled = 0
    word = line = blank = 0
    before, kind, in_word, last = 0, BREAK, False, 0
    for i in range(len(points)):
        point = int(points[i])
        if point < 65536:
            entry = int(table[point])
        elif 0x20000 <= point < 0x32400:
            entry = HAN if point < 0x2F800 else HAN | UNSETTLED
        else:
            entry = (PRIVATE if point >= 0xE0000 else OTHER) | UNSETTLED
        former, kind = kind, entry & 15
        counts[kind] += 1
        if kind in (SPACE, BREAK):
            untidy += former == SPACE
        if kind == BREAK:
            blank = blank + 1 if line == 0 else 0
            untidy += blank > 1
            ellipses += last & ELLIPSIS != 0
            longest_line = max(longest_line, line)
            line = word = last = 0
            in_word = False
            before = BREAK
            continue
        line += 1
        if kind == HAN:
            adjacent += former == HAN
            spaced += former == SPACE and before == HAN
        elif entry & (ELLIPSIS | HASH):
            hashes += entry & HASH != 0 and last != 0 and last & HASH == 0
            ellipsis_marks += entry & ELLIPSIS != 0 and last & ELLIPSIS == 0
        garbled += entry & GARBLED != 0
        unsettled += entry & UNSETTLED != 0
        letter = LATIN <= kind <= DIGIT
        words += letter and not in_word
        in_word = letter
        if kind == SPACE:
            before = former
            word = 0
            continue
        word = 0 if HAN <= kind <= HANGUL or kind == ODD_SPACE else word + 1
        longest_word = max(longest_word, word)
        mojibake += entry & TRAIL != 0 and last & LEAD != 0 and former != SPACE
        if last == 0:
            lines += 1
            bullets += entry & BULLET != 0
            last = entry | SEEN
        else:
            openings += last & OPENING != 0 and entry & SECOND != 0
            last = (entry & ~OPENING) | SEEN
    ellipses += last & ELLIPSIS != 0
    counts[14:] = (
        words, longest_word, max(longest_line, line), lines, bullets, ellipses, hashes,
        ellipsis_marks, garbled, mojibake, spaced, adjacent, untidy, openings, unsettled,
    )  # fmt: skip
    return counts
