"""Our encoder = `tokenizers`, id for id: every policy, every kind of vocabulary, odd texts; linear time."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bpe_vocabularies import (
    CORPUS,
    POLICIES,
    STAND_IN,
    aligned,
    byte_level,
    random_merges,
    read,
    stand_ins,
    with_merges,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import raw_lines
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from microlm.text.bpe import flat
from microlm.text.bpe.flat import Encoder
from microlm.text.bpe.pieces import REGEX, Pieces
from microlm.text.bpe.vocabulary import Unsupported

AWKWARD = (
    "李白明月光诗人的唐代疑霜 aTthepoem's’ \t\n\r\u3000\u200b\x000123½②，。é\u0301ñ가😀👍🏽\u0085\ufeff<|>"
)
TEXT = st.text(
    st.one_of(st.sampled_from(AWKWARD), st.characters(exclude_categories=["Cs"])), max_size=60
) | st.lists(st.sampled_from([*CORPUS, "明月光", " the", "aaaaaaaa", "\n\n", "<|im_end|>"]), max_size=4).map(
    "".join
)
KINDS = {"aligned": aligned, "bytes": byte_level}


def theirs(inner: HFTokenizer, texts: list[str]) -> list[list[int]]:
    inner.encode_special_tokens = True
    return [e.ids for e in inner.encode_batch(texts, add_special_tokens=False)]


def ours(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    ids, ends = encoder.encode(texts, None)
    return [part.tolist() for part in np.split(ids, ends)[:-1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(scope="module", params=["aligned", "bytes"])
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[HFTokenizer, Encoder]:
    inner = KINDS[request.param](Pieces())
    encoder = Encoder(read(inner, folder))
    assert encoder.is_aligned == (request.param == "aligned")
    return inner, encoder


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda r: f"{r.pattern}-{r.digits}-{r.whitespace}-{r.han_alone}"
)
def test_every_policy(policy: Pieces, kind: str, folder: Path) -> None:
    inner = KINDS[kind](policy)
    encoder = Encoder(read(inner, folder))

    @given(texts=st.lists(TEXT, max_size=4))
    @settings(max_examples=15)
    def holds(texts: list[str]) -> None:
        assert ours(encoder, texts) == theirs(inner, texts)

    holds()
    assert ours(encoder, list(CORPUS)) == theirs(inner, list(CORPUS))


@given(texts=st.lists(TEXT, max_size=5))
@settings(max_examples=300)
def test_awkward_texts(pair: tuple[HFTokenizer, Encoder], texts: list[str]) -> None:
    assert ours(pair[1], texts) == theirs(pair[0], texts)


@pytest.mark.parametrize("seed", range(60))
def test_vocabularies_of_random_merges(seed: int, folder: Path) -> None:
    inner = with_merges(random_merges(seed, 25), Pieces("qwen"))
    encoder = Encoder(read(inner, folder))
    rng = random.Random(seed)
    texts = ["".join(rng.choices("aéñ中国一b 😀😁", k=rng.randrange(30))) for _ in range(200)]
    texts += ["".join(rng.choices("aéñ中国一b", k=400)) for _ in range(10)]  # through the heap
    assert ours(encoder, texts) == theirs(inner, texts)


def test_random_vocabularies_are_of_both_kinds(folder: Path) -> None:
    """Otherwise the test above shows nothing of the aligned ones, or of the rule that tells them."""
    kinds = [
        Encoder(read(with_merges(random_merges(seed, 25), Pieces("qwen")), folder)).is_aligned
        for seed in range(60)
    ]
    assert 8 < sum(kinds) < 52


def test_a_merge_before_its_characters_is_not_aligned(folder: Path) -> None:
    """中国 merges before 一 is whole, though 国一 would come first: characters must not come first."""
    a, b, c = map(stand_ins, "中国一")
    whole = [(x[:end], x[end]) for x in (a, b) for end in (1, 2)]
    merges = [*whole, (b, c), (a, b), (c[:1], c[1]), (c[:2], c[2])]
    inner = with_merges(merges, Pieces("qwen"))
    encoder = Encoder(read(inner, folder))
    assert not encoder.is_aligned
    assert ours(encoder, ["中国一"]) == theirs(inner, ["中国一"])
    assert Encoder(read(with_merges([*merges[-2:], *merges[:-2]], Pieces("qwen")), folder)).is_aligned


def test_every_character(pair: tuple[HFTokenizer, Encoder]) -> None:
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(every[start : start + 997]) for start in range(0, len(every), 997)]
    assert ours(pair[1], texts) == theirs(pair[0], texts)


def test_random_texts_come_back(pair: tuple[HFTokenizer, Encoder]) -> None:
    rng = random.Random(1)
    texts = ["".join(_any(rng) for _ in range(rng.randrange(12))) for _ in range(100_000)]
    ids, ends = pair[1].encode(texts, None)
    vocabulary = pair[0].get_vocab()
    table = {number: token for token, number in vocabulary.items()}
    back = {character: byte for byte, character in STAND_IN.items()}
    raw = {number: bytes(back[c] for c in token) for number, token in table.items() if number > 2}
    starts = [0, *ends.tolist()]
    row = ids.tolist()
    for text, start, end in zip(texts, starts, starts[1:], strict=False):
        assert b"".join(raw[i] for i in row[start:end]).decode() == text


def _any(rng: random.Random) -> str:
    code = rng.choice([rng.randrange(0x80), rng.randrange(0x3000, 0xA000), rng.randrange(0x110000 - 0x800)])
    return chr(code if code < 0xD800 else code + 0x800)


@pytest.mark.shared
@pytest.mark.parametrize("kind", list(KINDS))
def test_held_out_documents(kind: str, folder: Path) -> None:
    inner = KINDS[kind](Pieces(digits="runs"))
    encoder = Encoder(read(inner, folder))
    lines = (line for number, line in enumerate(raw_lines("pretrain.jsonl.zst")) if number % 197 == 0)
    texts = [json.loads(line)["text"] for line in lines if line]
    assert len(texts) > 200
    assert ours(encoder, texts) == theirs(inner, texts)


def test_closing_is_put_after_every_text(pair: tuple[HFTokenizer, Encoder]) -> None:
    texts = ["the poem", "", "明月光"]
    ids, ends = pair[1].encode(texts, 2)
    assert ids.dtype == np.uint16
    assert [p.tolist() for p in np.split(ids, ends)[:-1]] == [[*row, 2] for row in theirs(pair[0], texts)]
    assert [part.tolist() for part in pair[1].encode([], 2)] == [[], []]


@pytest.mark.parametrize("word", ["aba", "abaab", "李白李", "aab李"])
def test_stretches_around_the_limit(word: str, folder: Path) -> None:
    """A long stretch is not cut where the room for short ones ends."""
    letters = [stand_ins(c) for c in dict.fromkeys(word)]
    merges = [(c[:end], c[end]) for c in letters for end in range(1, len(c))]
    merges += [(stand_ins(word[:end]), stand_ins(word[end])) for end in range(1, len(word))]
    inner = with_merges(list(dict.fromkeys(merges)), Pieces("qwen"))
    encoder = Encoder(read(inner, folder))
    assert encoder.is_aligned
    endless = word * 50
    texts = [endless[offset : offset + size] for offset in range(4) for size in range(88, 108)]
    assert ours(encoder, texts) == theirs(inner, texts)


WORST = {
    "one letter": lambda n: "a" * n,
    "spaces": lambda n: " " * n,
    "^": lambda n: "^" * n,
    "line ends": lambda n: "\n" * n,
    "one Han character": lambda n: "月" * (n // 3),
    "random Han": lambda n: "".join(map(chr, random.Random(0).choices(range(0x4E00, 0xA000), k=n // 3))),
    "known Han": lambda n: "".join(random.Random(0).choices("李白明月光诗人的唐代", k=n // 3)),
    "letters": lambda n: "".join(random.Random(0).choices("thepoms", k=n)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WORST))
def test_time_is_linear(pair: tuple[HFTokenizer, Encoder], name: str) -> None:
    """Four times the text: far from sixteen times the time. The figures are in benchmarks/tokenizer.py."""
    pair[1].encode(["warm"], None)
    found = []
    for _ in range(6):  # others may be at work on this machine
        once, more = (_seconds(pair[1], WORST[name](n)) for n in (1 << 19, 1 << 21))
        if more <= max(8 * once, 0.1):
            return
        found.append((once, more))
    pytest.fail(f"seconds of 0.5 and 2 MB: {found}")


def _seconds(encoder: Encoder, text: str) -> float:
    started = time.process_time()
    encoder.encode([text], None)
    return time.process_time() - started


@pytest.mark.parametrize("name", list(WORST))
def test_long_texts_are_equal_too(pair: tuple[HFTokenizer, Encoder], name: str) -> None:
    texts = [WORST[name](n) for n in (90, 97, 5_000, 40_001)]
    assert ours(pair[1], texts) == theirs(pair[0], texts)


def foreign(pre: Any, normalizer: Any = None, ignore_merges: bool = False) -> HFTokenizer:
    inner = byte_level(Pieces())
    inner.pre_tokenizer = pre
    if normalizer:
        inner.normalizer = normalizer
    data = json.loads(inner.to_str())
    data["model"]["ignore_merges"] = ignore_merges
    return HFTokenizer.from_str(json.dumps(data))


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
FOREIGN = {
    "gpt2": lambda: foreign(LEVEL),
    "smollm": lambda: foreign(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LEVEL])
    ),
    "qwen2": lambda: foreign(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(REGEX["qwen"]), "isolated"), PLAIN]),
        normalizers.NFC(),
    ),
    "llama3": lambda: foreign(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(REGEX["gpt4"]), "isolated"), PLAIN]),
        ignore_merges=True,
    ),
    "earlier ours": lambda: foreign(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("[\u4e00-\u9fff]|\\d"), "isolated"), LEVEL])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FOREIGN))
def test_published_tokenizers(name: str, folder: Path) -> None:
    inner = FOREIGN[name]()
    encoder = Encoder(read(inner, folder))

    @given(texts=st.lists(TEXT, max_size=4))
    @settings(max_examples=150)
    def holds(texts: list[str]) -> None:
        assert ours(encoder, texts) == theirs(inner, texts)

    holds()
    texts = [*CORPUS, "e\u0301 \u1100\u1161 \u212b \u0344", "७३ ٣٤٥ Ⅷ ²3", "ab\U0001e4ec\u0316c"]
    assert ours(encoder, texts) == theirs(inner, texts)


def test_tokens_that_merging_does_not_reach(folder: Path) -> None:
    """With ignore_merges a piece that is a token is that token, though its bytes do not merge so far."""
    inner = FOREIGN["llama3"]()
    data = json.loads(inner.to_str())
    data["model"]["vocab"]["Ġxyzzy"] = 520
    inner = HFTokenizer.from_str(json.dumps(data))
    [ids] = ours(Encoder(read(inner, folder)), ["a xyzzy xyzz"])
    assert [ids] == theirs(inner, ["a xyzzy xyzz"])
    assert 520 in ids


def _level(**fields: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True} | fields


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer is not NFC"),
        ({"pre_tokenizer": None}, "no pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "does not end in ByteLevel"),
        ({"pre_tokenizer": _level(add_prefix_space=True)}, "without a prefix space"),
        ({"pre_tokenizer": _level(use_regex=False)}, "not one of gpt2, gpt4, qwen"),
        ({"model": {"dropout": 0.1}}, "has dropout"),
        ({"model": {"byte_fallback": True}}, "has byte_fallback"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "has end_of_word_suffix"),
    ],
)  # fmt: skip
def test_what_is_not_compiled_says_why(change: dict[str, Any], reason: str, folder: Path) -> None:
    data = json.loads(byte_level(Pieces()).to_str())
    for key, value in change.items():
        data[key] = data[key] | value if key == "model" else value
    with pytest.raises(Unsupported, match=reason):
        Encoder(read(HFTokenizer.from_str(json.dumps(data)), folder))


def test_a_missing_byte_is_not_compiled(folder: Path) -> None:
    data = json.loads(with_merges([], Pieces()).to_str())
    del data["model"]["vocab"][STAND_IN[0xFE]]
    with pytest.raises(Unsupported, match="byte 0xfe has no token"):
        Encoder(read(HFTokenizer.from_str(json.dumps(data)), folder))


def test_nfc_leaves_stable_characters_alone() -> None:
    nfc = normalizers.NFC()
    stable = [chr(code) for code in np.flatnonzero(flat._stable()).tolist()]
    text = "".join(stable)
    assert nfc.normalize_str(text) == text
    for mark in ("\u0301", "\u3099"):  # the next character of such a text is not stable, so it is normalized
        assert not flat._stable()[ord(mark)]
    assert all(nfc.normalize_str(f"a{c}") == f"a{c}" for c in stable[:: len(stable) // 2000])


@pytest.mark.parametrize("kind", list(KINDS))
def test_plain_python_gives_the_same(kind: str, folder: Path) -> None:
    """The kernels without numba, in a fresh process."""
    inner = KINDS[kind](Pieces())
    read(inner, folder)
    texts = [*CORPUS, "aaaa" * 40, "明月" * 70, " " * 130, "疑" * 50]
    code = (
        "import sys, json; sys.modules['numba'] = None\n"
        "from pathlib import Path\n"
        "from microlm.text.bpe import vocabulary\n"
        "from microlm.text.bpe.flat import Encoder\n"
        "encoder = Encoder(vocabulary.read(Path(sys.argv[1])))\n"
        "ids, ends = encoder.encode(json.load(sys.stdin), 2)\n"
        "print(json.dumps([ids.tolist(), ends.tolist()]))\n"
    )
    told = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder / "tokenizer.json")],
        input=json.dumps(texts), capture_output=True, text=True, check=True,
    )  # fmt: skip
    ids, ends = json.loads(told.stdout)
    expected = [[*row, 2] for row in theirs(inner, texts)]
    assert [p.tolist() for p in np.split(np.array(ids), ends)[:-1]] == expected
