"""Tokenizers that are not byte-pair encoding: `unigram`, `wordpiece`, and models of SentencePiece.

Enters: texts. Leaves: a tokenizer of `tokenizers`. The first two write bytes in GPT-2's stand-in characters,
so they lose nothing and every later stage reads them; `sentencepiece` is for comparison and other programs.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from microlm.core.errors import UserError
from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import MARKS
from microlm.text.vocab.ranks import STAND_IN, one_regex

Algorithm = Literal["unigram", "wordpiece", "sentencepiece"]
MODEL = "tokenizer.model"
"""The file of a SentencePiece model beside its tokenizer.json."""
MAX_CHARS: dict[Algorithm, int] = {
    "unigram": 4_000_000,
    "wordpiece": 100_000_000,
    "sentencepiece": 20_000_000,
}
"""Characters that are learnt from; if there are more, a sample of all texts is taken and the rest counted."""
_COVERAGE = 0.9995  # of all characters; rarer ones are written as bytes
_LONGEST = 16  # characters of a piece: the search for the longest word takes the square of it
_RARE = "\ue000"  # of the private use area; stands for rare characters while unigram is trained
_NEVER = -1e6  # the score of what must not be found in a text


class Trained(NamedTuple):
    """A tokenizer, the files to put beside its tokenizer.json, and the texts that were read and left out."""

    inner: HFTokenizer
    files: dict[str, bytes]
    texts: int
    left_out: int


def train(
    algorithm: Algorithm, texts: Iterable[str], vocab_size: int, pieces: Pieces, control: Sequence[str]
) -> Trained:
    """Train on texts; `control` tokens have the first ids. The vocabulary may turn out smaller than asked."""
    smallest = len(control) + 256 + 1
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small for {len(control)} control tokens and 256 bytes; "
            f"set it to {smallest} or more"
        )
    used, left_out = _within(texts, MAX_CHARS[algorithm])
    if not any(used):
        raise UserError(f"{algorithm}: no text to learn from; check the source")
    sys.stderr.write(
        f"tokenizer {algorithm}: learns from {len(used):,} texts, {sum(map(len, used)):,} characters"
        f"{f'; {left_out:,} texts are left out' if left_out else ''}\n"
    )
    if algorithm == "unigram":
        inner, files = _unigram(used, vocab_size, pieces, control), dict[str, bytes]()
    elif algorithm == "wordpiece":
        inner, files = _word_piece(used, vocab_size, pieces, control), dict[str, bytes]()
    else:
        model = train_sentencepiece(used, vocab_size, control)
        inner, files = from_sentencepiece(model), {MODEL: model}
    inner.add_special_tokens([AddedToken(t, normalized=False) for t in control if t not in MARKS])
    inner.add_tokens([AddedToken(t, normalized=False) for t in control if t in MARKS])
    return Trained(inner, files, len(used), left_out)


def _within(texts: Iterable[str], most: int) -> tuple[list[str], int]:
    """The texts of the lowest hashes, up to so many characters in all, and how many others there were.

    A text that is too long by itself is cut.
    """
    used: list[tuple[int, str]] = []
    size = left_out = 0
    lowest_out = 1 << 64
    for whole in texts:
        text = whole[:most]
        hashed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        if hashed >= lowest_out:
            left_out += 1
            continue
        heapq.heappush(used, (-hashed, text))
        size += len(text)
        while size > most:
            lowest_out, out = -used[0][0], heapq.heappop(used)[1]
            size -= len(out)
            left_out += 1
    return [text for _, text in sorted(used, reverse=True)], left_out


def _byte_level(model: Any, pieces: Pieces, *, longest: int | None = None) -> HFTokenizer:
    inner = HFTokenizer(model)
    steps: list[Any] = [pre_tokenizers.Split(Regex(one_regex(pieces)), "isolated")]
    if longest:
        steps.append(pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{longest}}}"), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    return inner


def _word_piece(texts: list[str], vocab_size: int, pieces: Pieces, control: Sequence[str]) -> HFTokenizer:
    """The longest token first. All bytes are tokens, so nothing is unknown."""
    model = models.WordPiece(unk_token=control[0], max_input_chars_per_word=4 * _LONGEST)
    inner = _byte_level(model, pieces, longest=_LONGEST)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=list(control),
        initial_alphabet=sorted(STAND_IN.values()),
        continuing_subword_prefix="",
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def _unigram(texts: list[str], vocab_size: int, pieces: Pieces, control: Sequence[str]) -> HFTokenizer:
    """The likeliest row of tokens. Learnt on characters; then bytes take the place of rare characters."""
    own = _bytes_first(control)
    kept, _ = _frequent(texts, vocab_size - len(own))
    twice = sum(c.isascii() for c in kept)  # these are bytes already
    learner = HFTokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(one_regex(pieces)), "isolated"),
            pre_tokenizers.Split(Regex(_RARE), "removed"),
            pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{4 * _LONGEST}}}"), "isolated"),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(own) + twice, max_piece_length=_LONGEST, show_progress=False
    )
    rare = {ord(c): _RARE for c in set().union(*texts) - kept}
    learner.train_from_iterator((text.translate(rare) for text in texts), trainer)
    found = _scores(learner)
    least = min(found.values())
    scores = {token: _NEVER if token in control else least - 1.0 for token in own}
    scores |= {"".join(STAND_IN[b] for b in piece.encode()): score for piece, score in found.items()}
    return _byte_level(
        models.Unigram(list(scores.items())[:vocab_size], unk_id=None, byte_fallback=False), pieces
    )


def _bytes_first(control: Sequence[str]) -> list[str]:
    return [*control, *sorted(STAND_IN.values())]


def _frequent(texts: Sequence[str], most: int) -> tuple[set[str], float]:
    """The characters that make up nearly all of the texts, half of `most` at most, and their share."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    wanted, kept, covered = _COVERAGE * counts.total(), set[str](), 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted or 2 * (len(kept) + 1) > max(most, 2):
            break
        kept.add(character)
        covered += count
    return kept, covered / max(1, counts.total())


def _scores(learner: HFTokenizer) -> dict[str, float]:
    """Piece → score, rounded and in order: the learner adds up in no fixed order."""
    rows = json.loads(learner.to_str())["model"]["vocab"]
    scores = {str(piece): round(float(score), 6) for piece, score in rows}
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))


def train_sentencepiece(texts: Sequence[str], vocab_size: int, control: Sequence[str]) -> bytes:
    """A SentencePiece unigram model: no normalization, bytes for rare characters, digits one by one."""
    try:
        from sentencepiece import SentencePieceTrainer
    except ModuleNotFoundError:
        raise UserError(
            "algorithm sentencepiece needs the extra 'sentencepiece': pip install 'microlm[sentencepiece]'"
        ) from None
    pad, start, end, *rest = control
    _, share = _frequent(texts, vocab_size - len(control) - 256)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in texts for line in text.split("\n") if line]),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="unigram",
            character_coverage=max(0.98, 0.999 * share),  # it takes no less
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            num_threads=1,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            pad_piece=pad, bos_piece=start, eos_piece=end,
            control_symbols=rest,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as e:
        said = str(e).replace("\n", " ").strip(" .")
        raise UserError(f"sentencepiece cannot learn from this ({said[-160:]}); change vocab_size") from None
    return model.getvalue()


def from_sentencepiece(model: bytes) -> HFTokenizer:
    """A SentencePiece unigram model as `tokenizers` runs it."""
    from sentencepiece import SentencePieceProcessor

    inner = SentencePieceProcessor(model_proto=model)
    rows = [
        (
            inner.id_to_piece(i),
            _NEVER if inner.is_control(i) or inner.is_unknown(i) or inner.is_byte(i) else inner.get_score(i),
        )
        for i in range(inner.get_piece_size())
    ]
    made = HFTokenizer(models.Unigram(rows, unk_id=inner.unk_id(), byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made
