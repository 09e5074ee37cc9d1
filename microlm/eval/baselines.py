"""What a score is worth without a model: a regex and a nearest-template answerer, learnt from the training split alone.

Enters: training records and questions. Leaves: functions that answer test items, deterministic, one core.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from microlm.core.records import Extraction, Question
from microlm.eval.wordings import HEAD, TAIL, Match, Tokens, Wording, choose, learn, tokenise, windows
from microlm.text.extraction import Found

Extractor = Callable[[Extraction], Found]
Answerer = Callable[[str], str]
NAMES = ("regex", "nearest_template")
_OVERLAP, _FIT, _CANDIDATES = 0.3, 0.5, 3  # set once by thought, not by looking at the test split


def extractors(train: Sequence[Extraction]) -> dict[str, Extractor]:
    """The two extraction baselines by name."""
    return {"regex": _regex(train), "nearest_template": _nearest_template(train)}


def answerers(train: Sequence[Question]) -> dict[str, Answerer]:
    """The two question baselines by name; both answer "" where they find nothing."""
    return {"regex": _by_entity(train), "nearest_template": _nearest_question(train)}


def _regex(train: Sequence[Extraction]) -> Extractor:
    """Frequent wordings as regular expressions that must match a whole clause; the longest literal wins."""
    patterns = {
        relation: [(w, len(w.literals), _compile(w)) for w in wordings]
        for relation, wordings in learn(train, at_least=3, most=60).items()
    }

    def extract(record: Extraction) -> Found:
        matches = []
        for window, text in windows(record.text):
            for wording, size, pattern in chain.from_iterable(patterns.get(r, []) for r in record.allowed):
                if m := pattern.fullmatch(text):
                    found = m.groupdict()
                    matches.append(Match(window, size, wording, found.get("e", "").strip(), found["v"].strip()))
        return choose(matches)

    return extract


def _compile(wording: Wording) -> re.Pattern[str]:
    groups = {HEAD: "(?P<e>[^，]+?)", TAIL: "(?P<v>[^，]+?)"}
    return re.compile("".join(groups.get(t) or re.escape(t) for t in wording.tokens), re.IGNORECASE)


def _nearest_template(train: Sequence[Extraction]) -> Extractor:
    """For each clause the training wordings with most bigrams in common, aligned word by word to find the spans."""
    index: dict[str, defaultdict[str, list[Wording]]] = {}
    sizes: dict[Wording, int] = {}
    for relation, wordings in learn(train, at_least=2, most=200).items():
        index[relation] = defaultdict(list)
        for wording in wordings:
            grams = _bigrams(wording.tokens)
            sizes[wording] = len(grams)
            for gram in sorted(grams):
                index[relation][gram].append(wording)

    def extract(record: Extraction) -> Found:
        matches = []
        for window, text in windows(record.text):
            tokens = tokenise(text)
            shared: Counter[Wording] = Counter()
            for gram in sorted(_bigrams(tokens)):
                for relation in record.allowed:
                    shared.update(index.get(relation, {}).get(gram, ()))
            near = [(n / sizes[w], w) for w, n in shared.items() if n / sizes[w] >= _OVERLAP]
            for _, wording in sorted(near, key=lambda x: (-x[0], x[1].relation, x[1].tokens))[:_CANDIDATES]:
                score, head, tail = align(tokens, wording.tokens)
                if score >= _FIT * len(wording.literals):
                    matches.append(Match(window, score, wording, head, tail))
        return choose(matches)

    return extract


def _bigrams(tokens: Tokens) -> frozenset[str]:
    """Neighbouring words, masks and spaces left out; single words too, so that short wordings have something."""
    words = [t.lower() for t in tokens if not t.isspace()]
    pairs = [(a, b) for a, b in zip(words, words[1:], strict=False)]
    masks = (HEAD, TAIL)
    return frozenset([a + "\x00" + b for a, b in pairs if a not in masks and b not in masks]) or frozenset(
        w for w in words if w not in masks
    )


def align(tokens: Tokens, wording: Tokens) -> tuple[float, str, str]:
    """Lay a wording over a clause: `(score, head, tail)`.

    A literal that meets its word gives 1, one that is left out costs 0.5, a word that no mask covers costs 1,
    a mask costs 0.1 for each word that it covers (at least one). Dynamic programming over both sequences.
    """
    rows, columns = len(tokens) + 1, len(wording) + 1
    best = [[-math.inf] * columns for _ in range(rows)]
    step = [[""] * columns for _ in range(rows)]
    best[0][0] = 0.0
    for i in range(rows):
        for j in range(columns):
            for score, how in _moves(best, tokens, wording, i, j):
                if score > best[i][j]:
                    best[i][j], step[i][j] = score, how
    spans = {HEAD: "", TAIL: ""}
    i, j = rows - 1, columns - 1
    while i or j:
        how = step[i][j]
        if how in ("open", "cover"):
            spans[wording[j - 1]] = tokens[i - 1] + spans[wording[j - 1]]
        i -= how != "left out"
        j -= how in ("open", "literal", "left out")
        if not how:
            return -math.inf, "", ""
    return best[-1][-1], spans[HEAD].strip(), spans[TAIL].strip()


def _moves(
    best: list[list[float]], tokens: Tokens, wording: Tokens, i: int, j: int
) -> Iterable[tuple[float, str]]:
    mask = j > 0 and wording[j - 1] in (HEAD, TAIL)
    if i and j and mask:
        if tokens[i - 1] == "，":
            return  # neither a name nor a value runs over a comma
        yield best[i - 1][j - 1] - 0.1, "open"
        yield best[i - 1][j] - 0.1, "cover"
    elif i and j and tokens[i - 1].lower() == wording[j - 1].lower():
        yield best[i - 1][j - 1] + (0 if tokens[i - 1].isspace() else 1), "literal"
    if j and not mask:
        yield best[i][j - 1] - (0 if wording[j - 1].isspace() else 0.5), "left out"
    if i and not mask:
        yield best[i - 1][j] - (0 if tokens[i - 1].isspace() else 1), "extra"


def _by_entity(train: Sequence[Question]) -> Answerer:
    """The entity named in the question, then the training question about it that shares the longest keyword."""
    known: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for question, entity in zip(train, _entities([q.question for q in train]), strict=True):
        if entity:
            known[entity].append((question.question.replace(entity, "\x00"), question.answer))
    names = sorted(known, key=lambda e: (-len(e), e))

    def answer(question: str) -> str:
        entity = next((n for n in names if n in question), None)
        if entity is None:
            return ""
        rest = question.replace(entity, "\x00")
        shared = [(_common(rest, other), reply) for other, reply in known[entity]]
        size, reply = max(shared, key=lambda x: x[0])
        return reply if size >= 2 else ""

    return answer


def _entities(questions: Sequence[str]) -> list[str]:
    """The part of each question that changes while the rest recurs, and that recurs while the rest changes."""
    fills: defaultdict[tuple[Tokens, Tokens], set[Tokens]] = defaultdict(set)
    frames: defaultdict[Tokens, set[tuple[Tokens, Tokens]]] = defaultdict(set)
    split = [tokenise(q) for q in questions]
    for tokens in set(split):
        for span, frame in _spans(tokens):
            fills[frame].add(span)
            frames[span].add(frame)
    found = []
    for tokens in split:
        scored = [(min(len(fills[f]), len(frames[s])), len(s), s) for s, f in _spans(tokens)]
        found.append("".join(max(scored)[2]) if scored else "")
    return found


def _spans(tokens: Tokens) -> Iterable[tuple[Tokens, tuple[Tokens, Tokens]]]:
    for i in range(len(tokens)):
        for j in range(i + 1, min(i + 12, len(tokens)) + 1):
            if not tokens[i].isspace() and not tokens[j - 1].isspace() and j - i < len(tokens):
                yield tokens[i:j], (tokens[:i], tokens[j:])


def _common(a: str, b: str) -> int:
    """Length of the longest common substring that does not cross the entity."""
    best = 0
    row = [0] * (len(b) + 1)
    for x in a:
        row = [0] + [row[j] + 1 if x == y and x != "\x00" else 0 for j, y in enumerate(b)]
        best = max(best, *row)
    return best


def _nearest_question(train: Sequence[Question]) -> Answerer:
    """The answer of the training question with the highest cosine of character 1- to 3-grams, weighted by rarity."""
    grams = [Counter(_grams(q.question)) for q in train]
    frequency = Counter(chain.from_iterable(grams))
    rarity = {g: math.log(len(train) / n) + 0.1 for g, n in frequency.items()}
    index: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for i, bag in enumerate(grams):
        norm = math.sqrt(sum((n * rarity[g]) ** 2 for g, n in bag.items()))
        for g, n in bag.items():
            index[g].append((i, n * rarity[g] / norm))

    def answer(question: str) -> str:
        scores: defaultdict[int, float] = defaultdict(float)
        for g, n in Counter(_grams(question)).items():
            for i, weight in index.get(g, ()):
                scores[i] += n * rarity[g] * weight
        if not scores:
            return ""
        return train[min(scores, key=lambda i: (-scores[i], i))].answer

    return answer


def _grams(text: str) -> list[str]:
    return [text[i : i + n] for n in (1, 2, 3) for i in range(len(text) - n + 1)]
