"""Small byte-level vocabularies of every kind, trained in code by `tokenizers`. For tests of the encoder."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from microlm.text.bpe import vocabulary
from microlm.text.bpe.pieces import REGEX, Pieces
from microlm.text.bpe.vocabulary import BYTE_OF, Vocabulary
from microlm.text.tokenizer import SPECIAL

STAND_IN = {byte: character for character, byte in BYTE_OF.items()}
CORPUS = (
    "李白（701年—762年），字太白，是唐代的诗人。床前明月光，疑是地上霜；举头望明月，低头思故乡。",
    "唐代的诗人，唐代的诗，明月光，明月，故乡的明月。诗人们在唐代写了很多诗。",
    "The poet wrote the poem; it's the poet's poem, isn't it? They'll see: we've 3 of 42 poems in 1234567.",
    "def f(x):\n    return x + 1\n\n\nfor i in range(10):\n\tprint(f(i))   # naïve café, ½ ②",
    '{"name": "Ünïcödé", "ids": [1, 22, 333], "emoji": "😀👍🏽👨‍👩‍👧"}\r\n\r\n',
    "가나다라 가나 나다 ありがとう ありがとう καλημέρα καλή",
)
POLICIES = [
    Pieces(pattern, digits, space, han)
    for pattern, digits, space, han in itertools.product(
        ("gpt2", "gpt4", "qwen"), ("runs", "single", "triples"), ("runs", "single"), (False, True)
    )
]


def stand_ins(text: str) -> str:
    """A text as a vocabulary writes its bytes."""
    return "".join(STAND_IN[byte] for byte in text.encode())


def with_merges(merges: Sequence[tuple[str, str]], pieces: Pieces) -> HFTokenizer:
    """Control tokens, 256 bytes, then what the merges make."""
    tokens = [*SPECIAL, *STAND_IN.values(), *dict.fromkeys(left + right for left, right in merges)]
    ids = {token: number for number, token in enumerate(tokens)}
    inner = HFTokenizer(models.BPE(vocab=ids, merges=list(merges)))
    inner.pre_tokenizer = pieces.pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    return inner


def byte_level(pieces: Pieces, size: int = 520) -> HFTokenizer:
    """As `tokenizers` trains it: a token may hold parts of two characters."""
    inner = with_merges([], pieces)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS * 3, trainer)
    return inner


def aligned(pieces: Pieces) -> HFTokenizer:
    """Characters first, then what they make: no token cuts through a character."""
    letters = HFTokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(REGEX["gpt2"]), "isolated")
    letters.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=420, show_progress=False))
    merges: dict[tuple[str, str], None] = {}
    for character in sorted(set("".join(CORPUS)) - set("疑霜②")):  # these stay bytes
        parts = stand_ins(character)
        for end in range(1, len(parts)):
            merges[parts[:end], parts[end]] = None
    for left, right in json.loads(letters.to_str())["model"]["merges"]:
        if not set(left + right) & set("疑霜②"):
            merges[stand_ins(left), stand_ins(right)] = None
    return with_merges(list(merges), pieces)


def random_merges(seed: int, count: int) -> list[tuple[str, str]]:
    """Merges of no sense and in no order, of the bytes of few characters."""
    rng = random.Random(seed)
    alphabet = rng.choice(["aé中", "ab ", "中国一", "aéñ", "😀😁a"])
    whole = [stand_ins(c) for c in alphabet]
    tokens = list(dict.fromkeys("".join(whole)))
    if rng.random() < 0.7:  # mostly characters
        merges = [(c[:end], c[end]) for c in whole for end in range(1, len(c))]
        tokens += whole * 3
    else:
        merges = []
    for _ in range(count):
        pair = rng.choice(tokens), rng.choice(tokens)
        if len(pair[0] + pair[1]) <= 12:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    merges = list(dict.fromkeys(merges))
    if rng.random() < 0.5:
        rng.shuffle(merges)
    return merges


def read(inner: HFTokenizer, folder: Path) -> Vocabulary:
    """The vocabulary as we read it from the file."""
    file = folder / "tokenizer.json"
    inner.save(str(file))
    return vocabulary.read(file)
