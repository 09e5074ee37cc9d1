"""Corpora for the data benchmark. Enters: lines of real Chinese text. Leaves: shards with planted duplicates.

Everything follows from the seed. A planted document is known by its source, `planted:KIND:NUMBER:a` or `:b`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from microlm.core.records import Document
from microlm.text.clean import CleanRecipe, Effects, clean, rules
from microlm.text.dedup import digest
from microlm.text.split import Split, split_of

SHARES = (0.02, 0.02)  # of validation and test: the defaults of the stage
LEAST, MOST = 0.85, 0.95  # Jaccard of near duplicates
WINDOW = 2000  # documents whose sentences are mixed
REPEATED = 0.01  # of recombined documents come again as they are, and as many with changes
_SENTENCE = re.compile(r"[^。！？\n]*[。！？\n]*")


def real_lines(path: Path, limit: int) -> list[bytes]:
    """The first lines of a .zst file, at most `limit` bytes of them (0: all), with their ends."""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as unpacked:
        found = unpacked.read(limit) if limit else unpacked.read()
    lines: list[bytes] = found.splitlines(keepends=True)
    return lines if lines[-1].endswith(b"\n") else lines[:-1]


def write_shards(lines: Iterable[bytes], folder: Path, shard_bytes: int) -> int:
    """Write lines to files of about `shard_bytes`; the bytes of all."""
    folder.mkdir(parents=True)
    total = size = number = 0
    file = (folder / "0000.jsonl").open("wb")
    try:
        for line in lines:
            if size >= shard_bytes:
                file.close()
                number, size = number + 1, 0
                file = (folder / f"{number:04d}.jsonl").open("wb")
            size += file.write(line)
            total += len(line)
    finally:
        file.close()
    return total


def shuffled(lines: list[bytes], seed: int) -> list[bytes]:
    """The same lines in another order."""
    found = list(lines)
    random.Random(seed).shuffle(found)
    return found


def line_of(text: str, source: str) -> bytes:
    """One record as a line."""
    return json.dumps({"text": text, "source": source}, ensure_ascii=False).encode("utf-8") + b"\n"


def planted(lines: list[bytes], count: int, seed: int) -> list[bytes]:
    """The lines with `count` exact and `count` near duplicates of some of them, all shuffled.

    One of a near pair would be trained on, the other held out.
    """
    rng = random.Random(seed)
    found = list(lines)
    bases = _plain(found, rng)
    for kind in ("exact", "near"):
        for number in range(count):
            at, text, other = next(bases), "", ""
            while not other:
                at = at if not text else next(bases)
                text = json.loads(found[at])["text"]
                other = text if kind == "exact" else _across(text, rng)
            found[at] = line_of(text, f"planted:{kind}:{number}:a")
            found.append(line_of(other, f"planted:{kind}:{number}:b"))
    rng.shuffle(found)
    return found


def recombined(lines: list[bytes], size: int, seed: int) -> Iterator[bytes]:
    """`size` bytes: the lines, then documents as long as theirs of sentences of different documents."""
    rng = random.Random(seed)
    total = 0
    texts: list[str] = []
    for line in lines:
        total += len(line)
        yield line
    while total < size:
        order = list(range(len(lines)))
        rng.shuffle(order)
        for start in range(0, len(order), WINDOW):
            texts = [json.loads(lines[i])["text"] for i in order[start : start + WINDOW]]
            for text in _mixed(texts, rng):
                line = line_of(text, f"recombined:{total}")
                total += len(line)
                yield line
                if total >= size:
                    return


def jaccard(one: str, other: str) -> float:
    """Of two texts' sets of 5-grams of letters and digits: written for this file, not ours."""
    a, b = grams(one), grams(other)
    return len(a & b) / max(1, len(a | b))


def grams(text: str) -> set[str]:
    """5-grams of the text's letters and digits."""
    bare = "".join(c for c in text.lower() if c.isalnum())
    return {bare[i : i + 5] for i in range(max(1, len(bare) - 4))}


def most_alike(texts: list[str], number: int) -> float:
    """The highest Jaccard of a text with any other that is long enough to reach 0.8."""
    one = grams(texts[number])
    near = (t for n, t in enumerate(texts) if n != number and 0.5 < len(t) / len(texts[number]) < 2)
    return max((len(one & b) / len(one | b) for b in map(grams, near)), default=0.0)


def split_for(text: str) -> Split:
    """Where the stage puts a text that cleaning leaves alone."""
    return split_of(digest(text), *SHARES)


def _mixed(texts: list[str], rng: random.Random) -> Iterator[str]:
    cut = [[s for s in _SENTENCE.findall(text) if s] for text in texts]
    sentences = [s for document in cut for s in document]
    rng.shuffle(sentences)
    at = 0
    for document in cut:
        text = "".join(sentences[at : at + len(document)])
        at += len(document)
        yield text
        if rng.random() < REPEATED:
            yield text
        if rng.random() < REPEATED:
            yield changed(text, rng, 0.9)


def _plain(lines: list[bytes], rng: random.Random) -> Iterator[int]:
    """Numbers of lines of prose in Chinese, 150 to 5000 characters, that cleaning leaves as they are."""
    order = list(range(len(lines)))
    rng.shuffle(order)
    steps = rules(CleanRecipe())
    for at in order:
        text = json.loads(lines[at])["text"]
        han = sum("\u4e00" <= c <= "\u9fff" for c in text)
        if 150 <= len(text) <= 5000 and han >= 0.7 * len(text):
            cleaned, reason = clean(Document(text), steps, Effects())
            if reason is None and cleaned.text == text:
                yield at


def changed(text: str, rng: random.Random, alike: float) -> str:
    """The text with as many characters replaced as make the Jaccard of its 5-grams about `alike`."""
    chars = list(text)
    han = [i for i, c in enumerate(chars) if "\u4e00" <= c <= "\u9fff"]
    count = max(1, round(len(chars) * (1 - alike) / (1 + alike) / 5))
    for at in rng.sample(han, min(count, len(han))):
        chars[at] = chars[rng.choice(han)]
    return "".join(chars)


def _across(text: str, rng: random.Random) -> str:
    """A near duplicate of the text on the other side of the split; empty when a few tries make none."""
    side = split_for(text) == "train"
    for _ in range(400):
        other = changed(text, rng, rng.uniform(LEAST, MOST))
        if (split_for(other) == "train") != side and LEAST <= jaccard(text, other) <= MOST:
            return other
    return ""
