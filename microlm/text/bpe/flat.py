"""A vocabulary → an encoder over flat arrays, or the reason why it has to stay with `tokenizers`.

Taken: byte-level BPE with a pre-tokenizer that `pieces` can cut, without a normalizer or with NFC.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import normalizers

from microlm.text.bpe import pieces
from microlm.text.bpe.aligned import aligned, text_of
from microlm.text.bpe.apply import pair_table
from microlm.text.bpe.encode import (
    CHARACTERS,
    Tables,
    Whole,
    encode_aligned,
    encode_bytes,
    fill_whole,
    neighbour_slot,
)
from microlm.text.bpe.pieces import Rule
from microlm.text.bpe.vocabulary import BYTE_OF, Unsupported, Vocabulary

_ALONE = {
    "[\u4e00-\u9fff]": pieces.HAN,
    r"\p{N}": pieces.NUMBER,
    r"\d": pieces.DIGIT,
    r"\s": pieces.SPACE,
}
_TRIPLES = r"\p{N}{1,3}"
_REGEX = {regex: name for name, regex in pieces.REGEX.items()} | {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2"
}
_PATTERNS = ("gpt2", "gpt4", "qwen")
_STABLE = (  # NFC changes none of these characters, nor what stands beside them
    (0x0, 0x2FF), (0x400, 0x482), (0x48A, 0x52F), (0x2002, 0x20CF), (0x2190, 0x2328), (0x232B, 0x2ADB),
    (0x2E80, 0x2FDF), (0x2FF0, 0x3029), (0x3030, 0x3098), (0x309B, 0xA4CF), (0xAC00, 0xD7A3),
    (0xFF00, 0xFFEF), (0x1F000, 0x1FAFF), (0x20000, 0x2F7FF),
)  # fmt: skip


class Encoder:
    """A compiled vocabulary: `encode(texts)` gives what `tokenizers` gives, in arrays."""

    def __init__(self, known: Vocabulary) -> None:
        self._tables = compile_tables(known)
        self.is_aligned = len(self._tables.symbols) > CHARACTERS
        self._kernel = encode_aligned if self.is_aligned else encode_bytes
        self._dtype = np.dtype("<u2" if known.size <= 0xFFFF else "<u4")
        self._is_nfc = bool(known.settings.get("normalizer"))

    def encode(self, texts: list[str], closing: int | None) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The ids of all texts in a row, and the end of each; `closing` is put after every text."""
        codes, ends = self._code_points(texts)
        out = np.empty(4 * len(codes) + len(ends), dtype=self._dtype)
        out_ends = np.empty(len(ends), dtype=np.int64)
        count = self._kernel(codes, ends, self._tables, -1 if closing is None else closing, out, out_ends)
        return out[:count].copy(), out_ends

    def _code_points(self, texts: list[str]) -> tuple[pieces.Codes, NDArray[np.int64]]:
        codes, ends = pieces.code_points(texts)
        if not self._is_nfc:
            return codes, ends
        where = np.flatnonzero(~_stable()[codes])
        if not len(where):
            return codes, ends
        nfc = normalizers.NFC()
        touched = set(np.searchsorted(ends, where, side="right").tolist())
        return pieces.code_points([nfc.normalize_str(t) if i in touched else t for i, t in enumerate(texts)])


def compile_tables(known: Vocabulary) -> Tables:
    """The flat arrays of a vocabulary; Unsupported says why there are none."""
    rule = _rule(known.settings.get("pre_tokenizer"))
    _require_plain(known.settings)
    missing = [byte for stand_in, byte in BYTE_OF.items() if stand_in not in known.ids]
    if missing:
        raise Unsupported(f"byte {missing[0]:#04x} has no token")
    byte = np.zeros(256, dtype=np.int32)
    for stand_in, number in BYTE_OF.items():
        byte[number] = known.ids[stand_in]
    values = {
        (known.ids[left], known.ids[right]): rank << 32 | known.ids[left + right]
        for rank, (left, right) in enumerate(known.merges)
    }
    whole = _whole(known)
    characters, pairs = (None if len(whole.ids) else aligned(known)) or (np.zeros(0, np.int32), [])
    neighbours = np.zeros(1 << max(16, len(pairs).bit_length() + 4), dtype=np.uint8)
    for left, right in pairs:
        neighbours[neighbour_slot(neighbours, left, right)] = 1
    symbols = np.concatenate([byte, characters])
    return Tables(pieces.classes(), rule, symbols, pair_table(values), neighbours, whole)


def _require_plain(settings: dict[str, Any]) -> None:
    """Unsupported unless the model does nothing but merge."""
    model = settings["model"]
    if model["type"] != "BPE":
        raise Unsupported(f"the model is {model['type']}, not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise Unsupported(f"the model has {name}")
    normalizer = settings.get("normalizer")
    if normalizer and normalizer != {"type": "NFC"}:
        raise Unsupported("the normalizer is not NFC")


def _rule(pre: Any) -> Rule:
    """The rule of a pre-tokenizer as the file describes it."""
    steps = pre.get("pretokenizers") if isinstance(pre, dict) and pre.get("type") == "Sequence" else [pre]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps) or not steps:
        raise Unsupported("there is no pre-tokenizer")
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        raise Unsupported("the pre-tokenizer does not end in ByteLevel without a prefix space")
    pattern: str | None = "gpt2"
    if not last.get("use_regex", True):
        pattern = _REGEX.get(_isolated(before.pop())) if before else None
    if pattern is None or len(before) > 1:
        raise Unsupported("the pre-tokenizer's pattern is not one of gpt2, gpt4, qwen")
    alone, triples = _standing_alone(before[0]) if before else (0, False)
    return Rule(_PATTERNS.index(pattern), alone, triples)


def _standing_alone(step: dict[str, Any]) -> tuple[int, bool]:
    """The class bits of what a step before the pattern cuts out, and whether numbers go in threes."""
    if step.get("type") == "Digits" and step.get("individual_digits") is True:
        return pieces.NUMERIC, False
    words = _isolated(step).split("|")
    alone = 0
    for word in words:
        if word != _TRIPLES and word not in _ALONE:
            raise Unsupported("the pre-tokenizer's first step is not known")
        alone |= _ALONE.get(word, 0)
    if _TRIPLES in words and alone & (pieces.NUMBER | pieces.DIGIT):
        raise Unsupported("the pre-tokenizer's first step cuts numbers in two ways")
    return alone, _TRIPLES in words


def _isolated(step: dict[str, Any]) -> str:
    """The regular expression of a Split whose matches are pieces."""
    regex = step["pattern"].get("Regex") if isinstance(step.get("pattern"), dict) else None
    if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert") or not regex:
        raise Unsupported("the pre-tokenizer has a step that is not known")
    return str(regex)


def _whole(known: Vocabulary) -> Whole:
    """The tokens that a piece becomes without merging, where the model says so (Llama 3); else none."""
    texts, ids = [], []
    if known.settings["model"].get("ignore_merges"):
        for token, number in known.ids.items():
            text = text_of(token)
            if text:
                texts.append(text)
                ids.append(number)
    codes, ends = pieces.code_points(texts)
    bits = max(4, (2 * len(ids)).bit_length())
    whole = Whole(codes, ends, np.array(ids, dtype=np.int32), np.full(1 << bits, -1, dtype=np.int32))
    fill_whole(whole)
    return whole


def _stable() -> NDArray[np.bool_]:
    """Which code points NFC leaves alone, whatever stands beside them."""
    table = np.zeros(0x110000, dtype=np.bool_)
    for first, last in _STABLE:
        table[first : last + 1] = True
    return table
