"""A small vocabulary whose words cut across characters, quotes and commas, and a walk over all masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from microlm.core.records import Constraint
from microlm.engine.grammar import Grammars
from microlm.text.bpe.vocabulary import BYTE_OF
from microlm.text.tokenizer import MARKS, SPECIAL, Tokenizer

CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
WORDS = [
    '{"', '":', '":"', '",', '","', '"}', '"]', '["', '}}', '],',
    "ab", "aba", "bc", "a b", "\\n", '\\"', "12", "0,", "李白", "a李",
    b"\xe6\x9d", b"\x8e\xe7", b"\xe6\x9d\x8e\xe7", b"\x99\xbd",
]  # fmt: skip
"""Beside all single bytes; the last ones cut 李 (e69d8e) and 白 (e799bd) apart, and join them wrongly."""


def small_vocabulary(folder: Path) -> Tokenizer:
    """All bytes, `WORDS`, three special tokens and the marks, which are shown as text."""
    spelled = ["".join(CHARACTER_OF[b] for b in (w if isinstance(w, bytes) else w.encode())) for w in WORDS]
    steps = {
        word[: i + 1]: None for word in spelled for i in range(1, len(word))
    }  # BPE grows words one by one
    words = [*SPECIAL, *CHARACTER_OF.values(), *steps]
    merges = [(step[:-1], step[-1]) for step in steps]
    inner = HFTokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(w, special=True) for w in SPECIAL])
    inner.add_tokens([AddedToken(w, special=False) for w in MARKS])
    inner.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def check_masks(
    tokenizer: Tokenizer,
    constraint: Constraint,
    completable: Callable[[bytes], bool],
    whole: Callable[[bytes], bool],
    depth: int,
) -> int:
    """Walk every answer of at most `depth` bytes, and compare each mask with the oracle's; returns how many.

    An id is allowed exactly where the text with it can be completed, the EOS exactly where the text is whole.
    """
    grammars = Grammars(tokenizer)
    control = set(tokenizer.control.values())
    texts = {i: b for i, b in enumerate(tokenizer.token_bytes) if b and i not in control}
    matchers = {b"": grammars.matcher(constraint)}
    waiting, seen = [b""], 0
    while waiting:
        prefix = waiting.pop()
        matcher = matchers.pop(prefix)
        allowed = matcher.allowed()
        expected = {i for i, text in texts.items() if completable(prefix + text)}
        expected |= {tokenizer.eos_id} if whole(prefix) else set()
        found = set(np.flatnonzero(allowed).tolist())
        extra, missing = (
            sorted(tokenizer.token_bytes[i] for i in s) for s in (found - expected, expected - found)
        )
        assert found == expected, f"after {prefix!r}: wrongly allowed {extra}, wrongly forbidden {missing}"
        assert matcher.accepting == whole(prefix), prefix
        seen += 1
        for i in sorted(expected - {tokenizer.eos_id}):
            after = prefix + texts[i]
            if len(after) > depth or after in matchers:
                continue
            further = matcher.copy()
            assert further.consume(i), (prefix, texts[i])
            if further.stopped:
                assert not any(completable(after + t) for t in texts.values()), after
            if not further.stopped:
                matchers[after] = further
                waiting.append(after)
    return seen


def of_members(members: Iterable[str]) -> tuple[Callable[[bytes], bool], Callable[[bytes], bool]]:
    """The oracle of a finite language: what can be completed, and what is whole."""
    texts = {m.encode() for m in members}
    beginnings = {text[:i] for text in texts for i in range(len(text) + 1)}
    return beginnings.__contains__, texts.__contains__
