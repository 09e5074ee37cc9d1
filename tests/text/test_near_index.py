"""Clusters against brute force; numbering, blocks and ranges change nothing; planted pairs are found."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from shared_data import raw_lines

from microlm.text.near import clusters, index, signature
from microlm.text.near.index import Duplicates, NearIndex

THRESHOLD = 0.8
LETTERS = [chr(c) for c in range(0x4E00, 0x5600)]


def rank_of(text: str) -> int:
    """A rank that follows from the text alone: the longest first, then by digest."""
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:5], "big")
    return ((1 << 20) - len(text)) << 40 | digest


def resolve(
    folder: Path,
    texts: Sequence[str],
    block: int = 40,
    memory_mb: int = 256,
    seen: list[tuple[int, ...]] | None = None,
) -> Duplicates:
    """The near duplicates of texts, signed in blocks, last block first; `seen` gets the compared pairs."""
    folder.mkdir()
    starts = range(0, len(texts), block)
    for number in reversed(range(len(starts))):
        some = texts[starts[number] : starts[number] + block]
        index.write(folder, number, *signature.sign(some))

    def compare(pairs: NDArray[np.uint32]) -> NDArray[np.float64]:
        if seen is not None:
            seen.extend(tuple(sorted(pair)) for pair in pairs.tolist())
        return signature.jaccards(lambda some: [texts[i] for i in some], pairs)

    ranks = np.array([rank_of(t) for t in texts], dtype=np.uint64)
    return NearIndex(folder, len(starts), memory_mb).resolve(ranks, compare, THRESHOLD)


def brute_force(texts: Sequence[str]) -> list[int]:
    """The keeper of each text, from the exact Jaccard of all pairs."""
    sets = [signature.shingles(t) for t in texts]
    keeper = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if keeper[i] != keeper[j] and signature.jaccard(sets[i], sets[j]) >= THRESHOLD:
                one, other = sorted((keeper[i], keeper[j]), key=lambda d: rank_of(texts[d]))
                keeper = [one if k == other else k for k in keeper]
    return keeper


def changed(text: str, edits: int, rng: random.Random) -> str:
    """The text with so many characters replaced, left out or put in."""
    letters = list(text)
    for _ in range(edits):
        at = rng.randrange(len(letters))
        letters[at : at + rng.randrange(2)] = rng.choices(LETTERS, k=rng.randrange(2))
    return "".join(letters)


def alike(text: str, low: float, high: float, rng: random.Random) -> str:
    """A text whose exact Jaccard with this one lies between the two."""
    own = signature.shingles(text)
    fresh = text
    while not low <= signature.jaccard(own, signature.shingles(fresh)) <= high:
        if signature.jaccard(own, signature.shingles(fresh)) < low:
            fresh = text
        fresh = changed(fresh, 1, rng)
    return fresh


def corpus(seed: int, families: int = 60) -> list[str]:
    """Random texts, some with changed versions, some of these changed again."""
    rng = random.Random(seed)
    texts = []
    for _ in range(families):
        text = "".join(rng.choices(LETTERS, k=rng.randrange(30, 300)))
        texts.append(text)
        for _ in range(rng.choice([0, 0, 1, 3])):
            text = changed(rng.choice([texts[-1], text]), max(1, len(text) // 70), rng)
            texts.append(text)
    rng.shuffle(texts)
    return list(dict.fromkeys(texts))


def removed_texts(texts: Sequence[str], found: Duplicates) -> list[str]:
    return sorted(texts[i] for i in found.removed())


def counts(found: Duplicates) -> list[int]:
    return [found.clusters, found.candidates, found.rejected, found.compared]


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_all_pairs(tmp_path: Path, seed: int) -> None:
    texts = corpus(seed)
    found = resolve(tmp_path / "near", texts)
    keeper = brute_force(texts)
    assert found.keeper.tolist() == keeper
    assert found.clusters == len({k for d, k in enumerate(keeper) if k != d})
    for worse, better, jaccard in found.examples:
        assert keeper[worse] == keeper[better]
        assert rank_of(texts[better]) < rank_of(texts[worse])
        sets = signature.shingles(texts[worse]), signature.shingles(texts[better])
        assert jaccard == signature.jaccard(*sets) >= THRESHOLD


def test_numbering_and_blocks_change_nothing(tmp_path: Path) -> None:
    texts = corpus(7, 200)
    found = resolve(tmp_path / "first", texts)
    assert len(found.removed()) > 50
    for turn in range(3):
        shuffled = random.Random(turn).sample(texts, len(texts))
        again = resolve(tmp_path / str(turn), shuffled, block=(1, 37, 1000)[turn])
        assert removed_texts(shuffled, again) == removed_texts(texts, found)
        assert counts(again) == counts(found)
        assert [(shuffled[a], shuffled[b]) for a, b, _ in again.examples] == [
            (texts[a], texts[b]) for a, b, _ in found.examples
        ]


def test_ranges_and_buffers_change_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus(8, 300)
    found = resolve(tmp_path / "whole", texts)
    monkeypatch.setattr(index, "_ROW_BYTES", 1 << 16)  # so that 1 MB of memory makes hundreds of ranges
    monkeypatch.setattr(index, "_PAIRS", 3)
    monkeypatch.setattr(index, "_DIFFER", 1)
    small = resolve(tmp_path / "parts", texts, memory_mb=1)
    assert small.keeper.tolist() == found.keeper.tolist()


def test_a_chain_is_one_cluster_although_its_ends_differ(tmp_path: Path) -> None:
    rng = random.Random(3)
    chain = ["".join(rng.choices(LETTERS, k=300))]
    for _ in range(6):
        chain.append(alike(chain[-1], 0.85, 0.9, rng))
    ends = signature.jaccard(signature.shingles(chain[0]), signature.shingles(chain[-1]))
    assert ends < 0.7
    found = resolve(tmp_path / "near", chain)
    best = min(range(len(chain)), key=lambda d: rank_of(chain[d]))
    assert found.keeper.tolist() == [best] * len(chain)
    assert (found.clusters, len(found.removed())) == (1, 6)


@pytest.mark.parametrize("buffer", [2, 100_000])
def test_alike_below_the_threshold_is_compared_once_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int
) -> None:
    monkeypatch.setattr(index, "_PAIRS", buffer)
    rng = random.Random(4)
    text = "".join(rng.choices(LETTERS, k=400))
    texts = [text, *(alike(text, 0.76, 0.79, rng) for _ in range(12))]
    compared: list[tuple[int, ...]] = []
    found = resolve(tmp_path / "near", texts, seen=compared)
    assert found.keeper.tolist() == brute_force(texts) == list(range(13))
    assert len(compared) == len(set(compared)) == found.compared >= 10
    assert found.candidates > found.compared


@pytest.mark.parametrize("buffer", [1, 7, 100_000])
def test_members_of_a_group_meet_the_best_and_those_before_them(buffer: int) -> None:
    sizes = [2, 129, 300]
    first = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    documents = np.random.default_rng(0).permutation(sum(sizes)).astype(np.uint32)
    ranks = np.empty(len(documents), dtype=np.uint64)
    ranks[documents] = np.arange(len(documents), dtype=np.uint64)
    rows = first, documents, np.arange(len(documents))
    values = np.zeros((len(documents), 128), dtype=np.uint8)
    parent, differ = np.arange(len(documents), dtype=np.uint32), np.zeros(4, dtype=np.uint64)
    numbers, out = np.zeros(4, dtype=np.int64), np.empty((buffer, 2), dtype=np.uint32)
    found: list[tuple[int, int]] = []
    while numbers[clusters.ROW] < len(first):
        count = clusters.candidates(rows, values, ranks, parent, differ, 128, numbers, out)
        found += [(int(ranks[a]), int(ranks[b])) for a, b in out[:count]]
    expected = {
        (j, i)
        for i in range(len(first))
        for j in range(int(first[i]), i)
        if j - first[i] < clusters.FAN or i - j <= clusters.FAN
    }
    assert set(found) == expected
    assert len(found) == len(expected) == numbers[clusters.LOOKED_AT]


@pytest.mark.parametrize("size", [130, 1500])
def test_no_member_of_a_large_group_is_lost(tmp_path: Path, size: int) -> None:
    rng = random.Random(5)
    text = "".join(rng.choices(LETTERS, k=200))
    texts = list({changed(text, 1, rng) for _ in range(size)})
    found = resolve(tmp_path / "near", texts, block=500)
    assert found.clusters == 1
    assert len(found.removed()) == len(texts) - 1
    assert found.compared < 2 * len(texts)


def test_two_families_in_one_group_stay_apart(tmp_path: Path) -> None:
    rng = random.Random(6)
    head = "".join(rng.choices(LETTERS, k=300))
    tails = ["".join(rng.choices(LETTERS, k=60)) for _ in range(2)]  # shared is 0.71 of what either holds
    texts = [changed(head, 1, rng)[:290] + tails[i % 2] for i in range(400)]
    texts = list(dict.fromkeys(texts))
    found = resolve(tmp_path / "near", texts)
    assert found.keeper.tolist() == brute_force(texts)
    assert found.clusters == 2


def test_nothing_short_and_empty(tmp_path: Path) -> None:
    assert resolve(tmp_path / "none", []).keeper.tolist() == []
    texts = ["", "!?", "……", "山", "山！", "一二三四", "one two", "One, Two"]
    found = resolve(tmp_path / "short", texts, block=3)
    assert found.keeper.tolist() == brute_force(texts)
    assert len(found.removed()) == 2


def test_writing_a_block_again_replaces_it(tmp_path: Path) -> None:
    index.write(tmp_path, 0, *signature.sign(["床前明月光疑是地上霜"] * 9))
    index.write(tmp_path, 0, *signature.sign(["床前明月光疑是地上霜"] * 2))
    assert NearIndex(tmp_path, 1).count == 2
    assert not list(tmp_path.glob("*.part*"))


@pytest.fixture(scope="module")
def real() -> list[str]:
    """20,000 real documents of 100 to 8,000 characters."""
    found = (json.loads(line)["text"] for line in raw_lines("pretrain.jsonl.zst"))
    fit = (text for text in found if 100 <= len(text) <= 8000)
    return list(dict.fromkeys(islice(fit, 20_000)))


@pytest.mark.shared
def test_planted_duplicates_in_real_text_are_found_and_little_else(tmp_path: Path, real: list[str]) -> None:
    rng = random.Random(9)
    before = set(removed_texts(real, resolve(tmp_path / "before", real, block=2500)))
    chosen = rng.sample([t for t in real if t not in before], 100)
    planted = [alike(text, 0.85, 0.95, rng) for text in chosen]
    texts = [*real, *planted]
    found = resolve(tmp_path / "near", texts, block=2500)
    number = {text: i for i, text in enumerate(texts)}
    together = sum(
        found.keeper[number[a]] == found.keeper[number[b]] for a, b in zip(chosen, planted, strict=True)
    )
    assert together >= 99
    gone = set(removed_texts(texts, found))
    assert not (gone - before - set(chosen) - set(planted))
    keeper = found.keeper.tolist()
    pairs = np.array(rng.sample(range(len(real)), 2 * (len(real) // 2))).reshape(-1, 2).tolist()
    assert sum(keeper[a] == keeper[b] for a, b in pairs) <= 5
    for text in before:  # what goes from the real text has one that it is alike to
        family = [t for t, k in zip(texts, keeper, strict=True) if k == keeper[number[text]] and t != text]
        own = signature.shingles(text)
        assert max(signature.jaccard(own, signature.shingles(t)) for t in family) >= THRESHOLD


GROWTH = """
import resource, sys
from pathlib import Path
import numpy as np
from microlm.text.near import index, signature

folder, blocks, size = Path(sys.argv[1]), int(sys.argv[2]), 20_000
signature.sign(["what is compiled is loaded"])
for block in range(blocks):
    rng = np.random.default_rng(block)
    signatures = rng.integers(0, 256, (size, 128), dtype=np.uint8)
    bands = rng.integers(1, 1 << 63, (size, 18)).astype(np.uint64)
    signatures[1::20], bands[1::20] = signatures[::20], bands[::20]
    index.write(folder, block, signatures, bands)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ranks = np.random.default_rng(0).permutation(blocks * size).astype(np.uint64)
near = index.NearIndex(folder, blocks, 32)
found = near.resolve(ranks, lambda pairs: (pairs[:, 0] // 2 == pairs[:, 1] // 2).astype(np.float64))
assert len(found.removed()) == found.compared == blocks * size // 20, found.compared
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    def grown_mb(blocks: int) -> int:
        folder = tmp_path / str(blocks)
        folder.mkdir()
        command = [sys.executable, "-c", GROWTH, str(folder), str(blocks)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    bytes_a_document = 8 + 4 + 8  # ranks, and the random permutation they are made of; the forest
    few, many = grown_mb(10), grown_mb(100)
    assert few <= 64
    assert many - few <= 16 + bytes_a_document * 1_800_000 / 2**20
