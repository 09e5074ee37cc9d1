"""Merges = those of `tokenizers`; what is asked for in one way or another comes out the same."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from artifacts import PROSE
from bpe_blocks import Texts, as_model, learnt, theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import raw_lines
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from microlm.core.errors import UserError
from microlm.text.bpe.files import assemble
from microlm.text.bpe.learn import count, passes, table
from microlm.text.bpe.learn.choose import Choice
from microlm.text.bpe.learn.chunks import Chunks
from microlm.text.bpe.learn.count import CODE_POINTS, PairCounts
from microlm.text.bpe.learn.merges import learn
from microlm.text.bpe.learn.table import OutOfMemory
from microlm.text.bpe.pieces import REGEX, Pieces
from microlm.text.bpe.train import Plan, train
from microlm.text.sources import Tally

RULES = [
    Pieces(pattern, digits, space, han)
    for pattern, digits, space, han in itertools.product(
        ("gpt2", "gpt4", "qwen"), ("runs", "single", "triples"), ("runs", "single"), (False, True)
    )
]
WORDS = (
    "a",
    "ab",
    "ba",
    "aaaa",
    "bab",
    "the",
    " the",
    "  ",
    "\n",
    "12",
    "2024",
    "'s",
    "é",
    "李",
    "李白",
    "是。",
    "👍",
    "👍🏽",
)
TINY = st.sampled_from(["a", "ab", "abc", "ab ", "ab一", "aé👍"]).flatmap(
    lambda letters: st.lists(st.text(st.sampled_from(letters), max_size=60), min_size=1, max_size=6)
)
MIXED = st.lists(st.lists(st.sampled_from(WORDS), max_size=20).map("".join), min_size=1, max_size=6)
TEXTS = TINY | MIXED
NOTHING = np.zeros(0, dtype=np.int64)


def characters_learnt(texts: Sequence[str], room: int, least: int) -> list[list[str]]:
    """Merges of characters, by our loops, from whole pieces."""
    chunks = Chunks(Pieces().rule(), None, 0, 1 << 22)
    chunks.add(list(texts))
    made: list[str] = []
    merges = []
    rows = learn(chunks.columns(), CODE_POINTS, room, least, NOTHING, lambda _: None)
    for left, right, _ in rows.tolist():
        merges.append([made[i - CODE_POINTS] if i >= CODE_POINTS else chr(i) for i in (left, right)])
        made.append("".join(merges[-1]))
    assert len(set(made)) == len(made)
    return merges


def characters_theirs(texts: Sequence[str], room: int, least: int) -> list[list[str]]:
    """The same by `tokenizers`."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.Split(Regex(REGEX["gpt2"]), "isolated"),
        ]
    )
    size = len(set("".join(texts))) + room
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, min_frequency=least, show_progress=False)
    )
    found: list[list[str]] = json.loads(inner.to_str())["model"]["merges"]
    return found


@given(texts=TEXTS, room=st.integers(1, 60), least=st.integers(1, 5))
@settings(max_examples=300)
def test_merges_of_characters_are_those_of_tokenizers(texts: list[str], room: int, least: int) -> None:
    assert characters_learnt(texts, room, least) == characters_theirs(texts, room, least)


@given(texts=TEXTS, room=st.integers(0, 60), least=st.integers(1, 4))
@settings(max_examples=200)
def test_exact_training_is_that_of_tokenizers(texts: list[str], room: int, least: int) -> None:
    trained = learnt(texts, room, mode="exact", min_frequency=least)
    assert as_model(trained.choice) == theirs(texts, room, Pieces(), least)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.pattern}-{r.digits}-{r.whitespace}-{r.han_alone}")
def test_exact_training_cuts_as_tokenizers_does(rule: Pieces) -> None:
    rng = random.Random(7)
    texts = [*PROSE, *("".join(rng.choices(WORDS, k=40)) for _ in range(60))]
    trained = learnt(texts, 250, rule, mode="exact")
    assert as_model(trained.choice) == theirs(texts, 250, rule, 2)


def reference(texts: Sequence[str], room: int, least: int) -> set[bytes]:
    """Tokens by brute force: characters, their beginnings and all merges of characters, by their counts."""
    parts: dict[bytes, int] = {}
    for character in "".join(texts):
        whole = character.encode()
        for end in range(2, len(whole) + 1):
            parts[whole[:end]] = parts.get(whole[:end], 0) + 1
    chunks = Chunks(Pieces().rule(), None, 0, 1 << 22)
    chunks.add(list(texts))
    made: list[bytes] = []
    ranked = [(-n, is_whole(b), len(b), b) for b, n in parts.items() if n >= least]
    words = []
    rows = learn(chunks.columns(), CODE_POINTS, 1000, least, NOTHING, lambda _: None)
    for left, right, seen in rows.tolist():
        made.append(
            b"".join(made[i - CODE_POINTS] if i >= CODE_POINTS else chr(i).encode() for i in (left, right))
        )
        words.append((-seen, made[-1]))
    first = [(n, 0, b) for n, _, _, b in sorted(ranked)] + [(n, 1, b) for n, b in words]
    first.sort(key=lambda row: row[:2])
    return {b for _, _, b in first[:room]}


def is_whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


@given(texts=TEXTS, room=st.integers(0, 40), least=st.integers(1, 4), cut=st.integers(1, 40))
@settings(max_examples=200)
def test_aligned_training_takes_what_is_most_frequent_wherever_pieces_are_cut(
    texts: list[str], room: int, least: int, cut: int
) -> None:
    trained = learnt(texts, room, min_frequency=least, cut=cut)
    assert set(trained.choice.tokens) == reference(texts, room, least)
    assert trained.choice == learnt(texts, room, min_frequency=least, cut=1).choice
    report = trained.report
    assert room == 0 or report.cut <= max(least, report.last_count)
    assert trained.choice.last_count >= least or not trained.choice.tokens


@given(texts=TEXTS, room=st.integers(1, 60))
@settings(max_examples=100)
def test_no_token_of_aligned_training_cuts_through_a_character(texts: list[str], room: int) -> None:
    choice = learnt(texts, room).choice
    for token in choice.tokens:
        if not is_whole(token):  # the beginning of one character
            assert token[0] >= 0xE0 and all(0x80 <= byte < 0xC0 for byte in token[1:])
    inner = assemble(choice, Pieces(), ())
    known = inner.get_vocab()
    for left, right in choice.merges:
        for part in (left, right, left + right):
            assert len(part) == 1 or part in choice.tokens
    text = "".join(texts)
    assert inner.decode(inner.encode(text).ids) == text
    assert sorted(known.values()) == list(range(256 + len(choice.tokens)))


def test_order_blocks_and_processes_do_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = random.Random(3)
    texts = ["".join(rng.choices(WORDS, k=60)) for _ in range(90)]
    expected = learnt(texts, 120).choice
    rng.shuffle(texts)
    assert learnt(texts, 120).choice == expected
    monkeypatch.setattr(passes, "SMALL_BYTES", 100)
    monkeypatch.setattr(passes, "GROUP_BYTES", 1000)
    for mode in ("aligned", "exact"):
        one, many = (
            train([Texts((t,)) for t in texts], Plan(120, Pieces(), mode, processes=n), folder=tmp_path)
            for n in (1, 3)
        )
        assert (one.choice, one.tally) == (many.choice, many.tally)
        assert (one.report.processes, many.report.processes) == (1, 3)
        assert one.report.texts == many.report.texts == 90
        assert one.report.bytes == many.report.bytes == sum(len(t.encode()) for t in texts)
    assert expected == train([Texts(tuple(texts))], Plan(120, Pieces())).choice
    assert not list(tmp_path.iterdir())


def counted(texts: list[str], slots: int) -> PairCounts:
    counts = PairCounts(Pieces().rule(), slots * 24)
    for text in texts:
        counts.add([text])
    return counts


def test_a_full_table_forgets_only_rare_pairs_and_says_how_rare() -> None:
    rng = random.Random(5)
    letters = [chr(0x4E00 + i) for i in range(300)]
    texts = ["".join(rng.choices(letters, k=200)) + "李白" * 20 for _ in range(200)]
    whole, small = counted(texts, 1 << 20), counted(texts, 1 << 12)
    assert whole.lost == 0 < small.lost
    assert len(small.pairs) == 1 << 12
    exact = {int(key): int(n) for key, n in whole.pairs if key >= 0}
    found = {int(key): int(n) for key, n in small.pairs if key >= 0}
    assert all(n <= exact[key] <= n + small.lost for key, n in found.items())
    assert all(n <= small.lost for key, n in exact.items() if key not in found)
    cut = small.lost + 1
    frequent = {int(key) for key, n in small.frequent(cut, 1 << 20) if key >= 0}
    assert {key for key, n in exact.items() if n >= cut} <= frequent


def test_chunks_that_do_not_fit_are_cut_at_more_places() -> None:
    rng = random.Random(6)
    letters = [chr(0x4E00 + i) for i in range(40)]
    texts = ["".join(rng.choices(letters, weights=range(1, 41), k=50)) for _ in range(400)]
    frequent = counted(texts, 1 << 20).frequent(2, 1 << 20)
    small, large = (Chunks(Pieces().rule(), frequent, 2, most) for most in (5000, 1 << 20))
    for text in texts:
        small.add([text])
        large.add([text])
    assert large.cut == 2 < small.cut
    fresh = Chunks(Pieces().rule(), frequent, small.cut, 1 << 20)
    fresh.add(texts)
    assert spelled(small) == spelled(fresh) != spelled(large)
    with pytest.raises(OutOfMemory):
        Chunks(Pieces().rule(), frequent, 2, 40).add(texts)


def spelled(chunks: Chunks) -> dict[str, int]:
    begins, weights, symbols = chunks.columns()
    words = ["".join(map(chr, symbols[a : b - 1])) for a, b in itertools.pairwise(begins)]
    assert len(set(words)) == len(words)
    return dict(zip(words, map(int, weights), strict=True))


def test_memory_is_kept_or_the_number_to_change_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(8)
    letters = [chr(0x4E00 + i) for i in range(500)]
    texts = ["".join(rng.choices(letters, k=300)) for _ in range(200)] + ["李白是诗人"] * 200
    with pytest.raises(UserError, match="memory_mb 100 is too little to train in; set it to 256 or more"):
        learnt(texts, 10, memory_bytes=100 << 20)
    monkeypatch.setattr(passes, "PROCESS_BYTES", 0)
    monkeypatch.setattr(passes, "LEAST_TABLE", 1 << 10)
    few = learnt(texts, 4, memory_bytes=1 << 20, min_frequency=1)
    assert few.report.lost > 0 and few.report.cut > few.report.lost
    assert few.choice == learnt(texts, 4, min_frequency=1).choice
    with pytest.raises(UserError, match="does not fit in memory_mb 1; set memory_mb to 2, or vocab_size to"):
        learnt(texts, 2000, memory_bytes=1 << 20, min_frequency=1)
    with pytest.raises(UserError, match=r"memory_mb.*, or mode to aligned"):
        learnt(texts, 2000, memory_bytes=1 << 20, mode="exact")


CAPPED = """
import json, random, resource, sys
from microlm.text.bpe.pieces import Pieces
from microlm.text.bpe.train import Plan, train

class Letters:
    size, held = 96 << 20, 0
    def __init__(self, seed): self.seed = seed
    def texts(self, tally):
        rng = random.Random(self.seed)
        letters = [chr(0x4E00 + i) for i in range(20_000)]
        for _ in range(8):
            yield ["".join(rng.choices(letters, k=1 << 20))]

processes, memory = map(int, sys.argv[1:])
plan = Plan(40, Pieces(), processes=processes, memory_bytes=memory)
report = train([Letters(1), Letters(2)], plan).report.to_json()
print(json.dumps(report | {"child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_memory_is_kept_when_the_pairs_do_not_fit(processes: int, tmp_path: Path) -> None:
    """16 million pairs, nearly all different; the table's largest size is just what its share allows."""
    table = (1 << 23) * 16 * 3 // 2
    memory = (table + passes.PROCESS_BYTES) * (processes + 1 if processes > 1 else 1)
    learnt(["一二三"] * 9, 2)  # compiling takes memory of its own, once on a machine
    command = [sys.executable, "-c", CAPPED, str(processes), str(memory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["lost"] > 0 and report["processes"] == processes
    children = processes * report["child"] if processes > 1 else 0
    assert report["peak_memory_bytes"] + children < memory


def test_a_first_cut_that_is_too_high_is_lowered() -> None:
    texts = list(PROSE) * 30
    high = learnt(texts, 120, cut=10_000)
    assert high.report.rounds > 1
    assert high.choice == learnt(texts, 120).choice


def test_a_text_may_be_one_long_piece() -> None:
    text = "的一是" * 40_000 + "a" * 100_000 + "一" * 100_000
    choice = learnt([text], 60, min_frequency=2).choice
    assert max(map(len, choice.tokens)) > 1000
    exact = learnt(["ab" * 3000 + "a" * 5000], 25, mode="exact").choice
    assert as_model(exact) == theirs(["ab" * 3000 + "a" * 5000], 25, Pieces(), 2)


def test_nothing_to_learn_is_no_error() -> None:
    for texts in ([], [""], ["a"], ["一"]):
        for mode in ("aligned", "exact"):
            trained = learnt(texts, 50, mode=mode)
            assert trained.choice == Choice([], [], 0)
            assert trained.report.texts == len(texts)


def test_tables_keep_what_they_hold() -> None:
    rng = random.Random(1)
    keys = [rng.getrandbits(42) for _ in range(5000)]
    rows = np.array([(key, i + 1) for i, key in enumerate(keys)], dtype=np.int64)
    full, used, lost = table.added(table.empty(table.FIRST, 2), 0, rows, 1 << 20)
    assert (used, lost) == (len(set(keys)), 0)
    assert [int(full[table.find(full, key), 1]) for key in keys] == [i + 1 for i in range(5000)]
    assert full[table.find(full, 1 << 50), 0] == table.EMPTY
    assert count.pair_key(0x10FFFF, 0x10FFFF) == (1 << 42) - 1 - (
        (0x1FFFFF - 0x10FFFF) << 21 | (0x1FFFFF - 0x10FFFF)
    )


@pytest.mark.shared
def test_on_a_real_corpus_exact_training_is_that_of_tokenizers_and_aligned_as_short() -> None:
    lines = itertools.islice(raw_lines("pretrain.jsonl.zst"), 700)
    texts = [json.loads(line)["text"] for line in lines]
    texts, held_out = texts[:500], texts[500:]
    room = 3000
    exact, aligned = (learnt(texts, room, mode=mode) for mode in ("exact", "aligned"))
    assert as_model(exact.choice) == theirs(texts, room, Pieces(), 2)
    sizes = [
        sum(len(e.ids) for e in assemble(t.choice, Pieces(), ()).encode_batch(held_out))
        for t in (exact, aligned)
    ]
    assert sizes[1] <= 1.005 * sizes[0]
    assert aligned.tally == Tally(500, 500)


def test_memory_that_is_too_little_for_the_shares_of_several_is_enough_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(9)
    letters = [chr(0x4E00 + i) for i in range(500)]
    texts = ["".join(rng.choices(letters, k=300)) for _ in range(200)]
    for name, value in (("PROCESS_BYTES", 0), ("LEAST_TABLE", 1 << 10), ("SMALL_BYTES", 100)):
        monkeypatch.setattr(passes, name, value)
    several = learnt(texts, 50, memory_bytes=16 << 20, mode="exact", processes=4)
    assert several.report.processes == 1  # four, each with a fifth of the memory, had too little
    assert several.choice == learnt(texts, 50, mode="exact").choice
