"""Ranks of tiktoken: a `.tiktoken` file and the JSON beside it ↔ byte-level BPE of `tokenizers`.

A line is a token in base64 and its rank; of two neighbours that make a token, the lowest rank goes first.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.text.bpe.pieces import REGEX, Pieces
from microlm.text.bpe.vocabulary import BYTE_OF

STAND_IN = {byte: character for character, byte in BYTE_OF.items()}
_HAN = "\u4e00-\u9fff"
_QWEN3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN: dict[int, tuple[str, bool]] = {
    50_256: (REGEX["gpt2"], False),  # r50k_base
    100_256: (REGEX["gpt4"], False),  # cl100k_base
    151_643: (REGEX["qwen"], True),  # Qwen to Qwen3
    248_044: (_QWEN3_5, True),  # Qwen3.5
}
"""Published vocabularies by their number of ranks: pattern, and whether texts are made NFC first."""


def beside(file: Path) -> Path:
    """The JSON that says what a `.tiktoken` file cannot: name, pattern, control tokens."""
    return file.with_name(file.name + ".json")


def read(file: Path) -> HFTokenizer:
    """A `.tiktoken` file as `tokenizers` runs it; the pattern from the JSON beside it, or a known one."""
    ranks = _ranks(file)
    special: dict[str, int] = {}
    if beside(file).is_file():
        pattern, special = _settings(beside(file))
        nfc = False
    elif len(ranks) in KNOWN:
        pattern, nfc = KNOWN[len(ranks)]
    else:
        raise UserError(
            f"{file}: {len(ranks):,} ranks are of no vocabulary that is known, so its pattern is not either; "
            f'write {{"pat_str": …, "special_tokens": {{}}}} to {beside(file).name}'
        )
    return _tokenizer(ranks, pattern, special, nfc=nfc)


def _ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            token, rank = base64.b64decode(words[0], validate=True), int(words[1])
        except (binascii.Error, ValueError, IndexError):
            raise UserError(
                f"{file}:{number}: expected a token in base64 and its rank; is it a .tiktoken file?"
            ) from None
        if not token or rank < 0 or token in ranks:
            raise UserError(f"{file}:{number}: the token is empty or there twice; download the file again")
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks):
        fault = f"{len(missing)} of the 256 bytes have no rank" if missing else "two tokens have one rank"
        raise UserError(f"{file}: {fault}; download the file again")
    return ranks


def _settings(file: Path) -> tuple[str, dict[str, int]]:
    try:
        data = json.loads(file.read_bytes())
        pattern, special = data["pat_str"], dict(data["special_tokens"])
        Regex(pattern)
        return str(pattern), {str(token): int(number) for token, number in special.items()}
    except Exception as e:  # Regex raises a bare Exception
        raise UserError(f"{file}: expected pat_str and special_tokens ({str(e)[:80]}); mend it") from None


def _tokenizer(ranks: dict[bytes, int], pattern: str, special: dict[str, int], *, nfc: bool) -> HFTokenizer:
    ordered = sorted(ranks, key=ranks.__getitem__)
    names = {token: "".join(STAND_IN[byte] for byte in token) for token in ordered}
    merges = [(names[a], names[b]) for token in ordered for a, b in _splits(token, ranks)]
    vocab = {names[token]: rank for token, rank in ranks.items()} | special
    inner = HFTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    if nfc:
        inner.normalizer = normalizers.NFC()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return inner


def _splits(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every two tokens that make this one: tiktoken merges any of them, at the rank of what they make."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in pairs if left in ranks and right in ranks]


def write(file: Path, ranks: dict[bytes, int], pattern: str, special: dict[str, int], name: str) -> None:
    """Write the ranks, and beside them what `tiktoken.Encoding` wants to be told."""
    lines = [
        f"{base64.b64encode(token).decode()} {rank}\n"
        for token, rank in sorted(ranks.items(), key=lambda r: r[1])
    ]
    settings: dict[str, Any] = {
        "name": name,
        "explicit_n_vocab": len(ranks) + len(special),
        "pat_str": pattern,
        "special_tokens": special,
    }
    storage.write_atomic(file, "".join(lines).encode())
    storage.write_atomic(beside(file), (json.dumps(settings, ensure_ascii=False, indent=1) + "\n").encode())


def one_regex(pieces: Pieces) -> str:
    """A single regular expression that cuts as `Pieces` does in two steps."""
    stops = ("\\p{N}" if pieces.digits != "runs" else "") + (_HAN if pieces.han_alone else "")
    triples = r"\p{N}" if pieces.pattern == "qwen" else r"\p{N}{1,3}"  # qwen takes them one by one after all
    alone = {"runs": [], "single": [r"\p{N}"], "triples": [triples]}[pieces.digits]
    alone += [f"[{_HAN}]"] if pieces.han_alone else []
    alone += [r"\s"] if pieces.whitespace == "single" else []
    if not alone:
        return REGEX[pieces.pattern]
    letters = rf"(?:(?![{_HAN}])\p{{L}})+" if pieces.han_alone else r"\p{L}+"
    han = _HAN if pieces.han_alone else ""
    newlines = "" if pieces.whitespace == "single" else r"[\r\n]*"
    if pieces.pattern == "gpt2":
        numbers = [r" ?\p{N}+"] if pieces.digits == "runs" else []
        rest = [r"'s|'t|'re|'ve|'m|'ll|'d", f" ?{letters}", *numbers, rf" ?[^\s\p{{L}}\p{{N}}{han}]+"]
    else:
        number = r"\p{N}{1,3}" if pieces.pattern == "gpt4" else r"\p{N}"
        rest = [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", rf"[^\r\n\p{{L}}\p{{N}}{han}]?{letters}", number]
        rest += [rf" ?[^\s\p{{L}}\p{{N}}{han}]+{newlines}", r"\s*[\r\n]+"]
    spaces = [rf"\s+(?=[{stops}])"] if stops else []
    return "|".join([*alone, *rest, *spaces, r"\s+(?!\S)", r"\s+"])
