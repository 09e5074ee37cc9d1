"""Pre-tokenization: where pieces end that no token reaches across, as `tokenizers` cuts them.

A text is first cut at the characters that stand alone (digits, Han, white space, as the rule says), and each
segment by one of three patterns. Enters: code points, the classes of all characters. Leaves: ends.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, pre_tokenizers

from microlm.text.compiled import njit

Codes = NDArray[np.uint32]
Classes = NDArray[np.uint8]
Pattern = Literal["gpt2", "gpt4", "qwen"]

LETTER, NUMBER, SPACE, DIGIT, NUMERIC, HAN = 1, 2, 4, 8, 16, 32
r"""Bits of a class: \p{L}, \p{N}, \s, \d as the regular expressions of `tokenizers` know them, Rust's
is_numeric (the pre-tokenizer Digits), and U+4E00 to U+9FFF."""
_WORD = LETTER | NUMBER | SPACE
_CODE_POINTS = 0x110000
_GPT2, _GPT4, _QWEN = range(3)
_QUOTE, _BLANK, _LONG_S = 0x27, 0x20, 0x17F

REGEX = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""The published patterns of GPT-2, of GPT-4 (cl100k, also Llama 3) and of Qwen2 to Qwen3."""


class Rule(NamedTuple):
    """How a text is cut, as compiled functions take it."""

    pattern: int
    alone: int  # class bits of characters that stand alone
    triples: bool  # numbers are cut into groups of up to three before the pattern


@dataclass(frozen=True)
class Pieces:
    """How a text is cut, as people say it."""

    pattern: Pattern = "gpt2"
    digits: Literal["runs", "single", "triples"] = "single"
    whitespace: Literal["runs", "single"] = "runs"
    han_alone: bool = False

    def rule(self) -> Rule:
        """The same for compiled functions."""
        alone = (NUMBER if self.digits == "single" else 0) | (HAN if self.han_alone else 0)
        alone |= SPACE if self.whitespace == "single" else 0
        return Rule(["gpt2", "gpt4", "qwen"].index(self.pattern), alone, self.digits == "triples")

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The same for `tokenizers`."""
        alone = [
            regex
            for regex, is_asked in (
                ("[\u4e00-\u9fff]", self.han_alone),
                (r"\p{N}", self.digits == "single"),
                (r"\p{N}{1,3}", self.digits == "triples"),
                (r"\s", self.whitespace == "single"),
            )
            if is_asked
        ]
        steps: list[pre_tokenizers.PreTokenizer] = []
        if alone:
            steps.append(pre_tokenizers.Split(Regex("|".join(alone)), "isolated"))
        if self.pattern == "gpt2":
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(REGEX[self.pattern]), "isolated"))
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


@functools.cache
def classes() -> Classes:
    """Code point → bits; from classes.tsv (`first last bits`, hexadecimal), which a test compares."""
    table = np.zeros(_CODE_POINTS, dtype=np.uint8)
    for line in resources.files("microlm.text.bpe").joinpath("classes.tsv").read_text("ascii").splitlines():
        first, last, bits = (int(word, 16) for word in line.split())
        table[first : last + 1] = bits
    return table


def code_points(texts: list[str]) -> tuple[Codes, NDArray[np.int64]]:
    """All texts in a row, and the exclusive end of each. Lone surrogates are an error of the caller."""
    ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))
    return np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32), ends


@njit
def segment_end(codes: Codes, start: int, end: int, table: Classes, rule: Rule) -> int:
    """The end of the segment that starts here: one character that stands alone, or all up to the next."""
    if rule.alone == 0 and not rule.triples:
        return end
    bits = table[codes[start]]
    if bits & rule.alone:
        return start + 1
    if rule.triples and bits & NUMBER:
        stop = start + 1
        while stop < min(end, start + 3) and table[codes[stop]] & NUMBER:
            stop += 1
        return stop
    stop = start + 1
    while stop < end and not table[codes[stop]] & rule.alone:
        if rule.triples and table[codes[stop]] & NUMBER:
            break
        stop += 1
    return stop


@njit
def piece_end(codes: Codes, start: int, end: int, table: Classes, rule: Rule) -> int:
    """The end of the pattern's match that starts here, in a segment that ends at `end`."""
    if rule.pattern == _GPT2:
        return _gpt2(codes, start, end, table)
    return _gpt4(codes, start, end, table, 3 if rule.pattern == _GPT4 else 1)


@njit
def _gpt2(codes: Codes, start: int, end: int, table: Classes) -> int:
    first = codes[start]
    if first == _QUOTE:
        stop = _contraction(codes, start, end, False)
        if stop > start:
            return stop
    stop = start
    if first == _BLANK and start + 1 < end and not table[codes[start + 1]] & SPACE:
        stop += 1
    kind = table[codes[stop]] & _WORD
    if kind & SPACE:
        return _space(codes, start, end, table)
    stop += 1
    while stop < end and table[codes[stop]] & _WORD == kind:
        stop += 1
    return stop


@njit
def _gpt4(codes: Codes, start: int, end: int, table: Classes, digits: int) -> int:
    first = codes[start]
    if first == _QUOTE:
        stop = _contraction(codes, start, end, True)
        if stop > start:
            return stop
    kind = table[first] & _WORD
    is_newline = first == 10 or first == 13
    stop = start
    if not kind & (LETTER | NUMBER) and not is_newline and start + 1 < end:
        stop += int(table[codes[start + 1]] & LETTER > 0)
    if table[codes[stop]] & LETTER:
        while stop < end and table[codes[stop]] & LETTER:
            stop += 1
        return stop
    if kind & NUMBER:
        stop = start + 1
        while stop < min(end, start + digits) and table[codes[stop]] & NUMBER:
            stop += 1
        return stop
    stop = start
    if first == _BLANK and start + 1 < end and not table[codes[start + 1]] & _WORD:
        stop += 1
    if not table[codes[stop]] & _WORD:
        while stop < end and not table[codes[stop]] & _WORD:
            stop += 1
        while stop < end and (codes[stop] == 10 or codes[stop] == 13):
            stop += 1
        return stop
    stop = start
    newline = -1
    while stop < end and table[codes[stop]] & SPACE:
        if codes[stop] == 10 or codes[stop] == 13:
            newline = stop
        stop += 1
    return newline + 1 if newline >= 0 else _space(codes, start, end, table)


@njit
def _space(codes: Codes, start: int, end: int, table: Classes) -> int:
    """White space up to the last, which the next piece may want; all of it at the end of a segment."""
    stop = start + 1
    while stop < end and table[codes[stop]] & SPACE:
        stop += 1
    return stop if stop == end else max(start + 1, stop - 1)


@njit
def _contraction(codes: Codes, start: int, end: int, any_case: bool) -> int:
    """The end of 's 't 're 've 'm 'll 'd, or `start`."""
    if start + 1 >= end:
        return start
    one = _lower(codes[start + 1], any_case)
    if one == 115 or one == 116 or one == 109 or one == 100:
        return start + 2
    if start + 2 >= end:
        return start
    two = _lower(codes[start + 2], any_case)
    if (two == 101 and (one == 114 or one == 118)) or (one == 108 and two == 108):
        return start + 3
    return start


@njit
def _lower(code: int, any_case: bool) -> int:
    if not any_case:
        return code
    if 65 <= code <= 90:
        return code + 32
    return 115 if code == _LONG_S else code
