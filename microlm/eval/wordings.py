"""Training records → wordings (clauses with head and tail masked), and the choice among their matches.

What the two extraction baselines share. It knows nothing of how the training texts were written.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from microlm.core.records import Extraction

HEAD, TAIL = "\x00e", "\x00v"  # a masked head, a masked tail: tokens that no text holds
Tokens = tuple[str, ...]
_TOKEN = re.compile(r"[A-Za-z0-9]+|\s+|.", re.DOTALL)
_SENTENCE = re.compile(r"[。；！？;]|\.(?=\s|$)")
_CLAUSE = re.compile(r"，|(?<!\d),(?!\d)")
_PRONOUN = re.compile(r"(他|她|它|该.{1,5}|it|he|she|they)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Wording:
    """A masked clause that states `relation`; without HEAD its subject is the entity named last."""

    relation: str
    tokens: Tokens

    @property
    def literals(self) -> Tokens:
        """Its own words: neither mask nor space."""
        return tuple(t for t in self.tokens if t not in (HEAD, TAIL) and not t.isspace())


@dataclass(frozen=True, slots=True)
class Match:
    """A wording laid over a window of clauses: what its masks cover; a higher score is a better fit."""

    window: tuple[int, int]
    score: float
    wording: Wording
    head: str
    tail: str


def tokenise(text: str) -> Tokens:
    """Words of Latin letters and digits, single characters otherwise."""
    return tuple(_TOKEN.findall(text))


def windows(text: str) -> list[tuple[tuple[int, int], str]]:
    """Every clause and every two neighbours of a sentence, with the span of clause numbers they cover."""
    found: list[tuple[tuple[int, int], str]] = []
    number = 0
    for sentence in _SENTENCE.split(text):
        commas = _CLAUSE.findall(sentence)
        clauses = _CLAUSE.split(sentence)
        for i, clause in enumerate(clauses):
            if clause.strip():
                found.append(((number + i, number + i + 1), clause.strip()))
            if i + 1 < len(clauses):
                found.append(((number + i, number + i + 2), (clause + commas[i] + clauses[i + 1]).strip()))
        number += len(clauses)
    return found


Counts = Mapping[str, Counter[Tokens]]
"""Relation → how often each wording states it."""


def count(records: Iterable[Extraction]) -> Counts:
    """The wordings of the records' triples."""
    counts: defaultdict[str, Counter[Tokens]] = defaultdict(Counter)
    for record in records:
        parts = windows(record.text)
        for t in record.relation:
            counts[t.relation].update(_masked(parts, t.head, t.tail))
    return counts


def learn(counts: Counts, at_least: int, most: int) -> dict[str, list[Wording]]:
    """Relation → its wordings seen `at_least` times, the `most` frequent ones, most frequent first.

    A wording that more often states other relations is left out: it would guess.
    """
    total: Counter[Tokens] = Counter()
    for found in counts.values():
        total.update(found)

    def kept(relation: str) -> list[Wording]:
        common = sorted(counts[relation].items(), key=lambda x: (-x[1], x[0]))
        clear = [t for t, n in common if n >= at_least and 2 * n > total[t]]
        return [Wording(relation, t) for t in clear[:most]]

    return {relation: kept(relation) for relation in sorted(counts)}


def _masked(parts: Sequence[tuple[tuple[int, int], str]], head: str, tail: str) -> list[Tokens]:
    """Masked: the shortest window that holds head and tail, and the shortest that holds the tail alone."""
    texts = sorted((text for _, text in parts if tail in text), key=len)
    found = []
    if both := next((text for text in texts if head in text), None):
        pair = [(head, HEAD), (tail, TAIL)]
        first, second = sorted(pair, key=lambda x: -len(x[0]))  # the longer first: it may hold the other
        masked = both.replace(first[0], f"\x00{first[1]}\x00", 1)
        found.append(_tokens(masked.replace(second[0], f"\x00{second[1]}\x00", 1)))
    if texts and texts[0] != both:
        found.append(_tokens(texts[0].replace(tail, f"\x00{TAIL}\x00", 1)))
    return [tokens for tokens in found if TAIL in tokens]


def _tokens(masked: str) -> Tokens:
    """Split at the masks; two masks that touch, or no literal at all, make no wording: ()."""
    tokens: list[str] = []
    for part in re.split(f"\x00({HEAD}|{TAIL})\x00", masked):
        tokens += [part] if part in (HEAD, TAIL) else tokenise(part)
    touching = any({a, b} <= {HEAD, TAIL} for a, b in pairwise(tokens))
    literal = [t for t in tokens if t not in (HEAD, TAIL) and not t.isspace()]
    return () if touching or not literal else tuple(tokens)


def choose(matches: Iterable[Match]) -> frozenset[tuple[str, str, str]]:
    """Best matches first, no clause used twice; then, in reading order, pronouns take the head named last."""
    taken: set[int] = set()
    kept: list[Match] = []
    for m in sorted(matches, key=lambda m: (-m.score, m.window, m.wording.relation, m.wording.tokens)):
        clauses = set(range(*m.window))
        if not clauses & taken:
            taken |= clauses
            kept.append(m)
    triples: set[tuple[str, str, str]] = set()
    last = next((m.head for m in sorted(kept, key=lambda m: m.window) if _named(m.head)), "")
    for m in sorted(kept, key=lambda m: m.window):
        last = m.head if _named(m.head) else last
        if last and m.tail:
            triples.add((last, m.wording.relation, m.tail))
    return frozenset(triples)


def _named(head: str) -> bool:
    return bool(head) and not _PRONOUN.fullmatch(head)
