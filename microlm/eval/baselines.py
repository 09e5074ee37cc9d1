"""What a score is worth without a model: a regex and a nearest-template answerer, learnt from training data.

Enters: training records and questions. Leaves: functions that answer test items, deterministic, one core.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise

from microlm.core.records import Extraction, Question
from microlm.eval.wordings import (
    HEAD,
    TAIL,
    Counts,
    Match,
    Tokens,
    Wording,
    choose,
    count,
    learn,
    tokenise,
    windows,
)
from microlm.text.extraction import Found

Extractor = Callable[[Extraction], Found]
Answerer = Callable[[str], str]
NAMES = ("regex", "nearest_template")
_OVERLAP, _FIT, _CANDIDATES = 0.3, 0.5, 3  # set by hand, not fitted


def extractors(train: Sequence[Extraction]) -> dict[str, Extractor]:
    """The two extraction baselines by name."""
    counts = count(train)
    return {"regex": _regex(counts), "nearest_template": _nearest_template(counts)}


def answerers(train: Sequence[Question], names: Iterable[str]) -> dict[str, Answerer]:
    """The two question baselines; `names` are the training split's entities. No finding is answered ""."""
    return {"regex": _by_entity(train, names), "nearest_template": _nearest_question(train)}


def _regex(counts: Counts) -> Extractor:
    """Frequent wordings as regular expressions that must match a whole clause; the longest literal wins."""
    patterns = {
        relation: [(w, len(w.literals), _compile(w)) for w in wordings]
        for relation, wordings in learn(counts, at_least=3, most=60).items()
    }

    def extract(record: Extraction) -> Found:
        matches = []
        for window, text in windows(record.text):
            for wording, size, pattern in chain.from_iterable(patterns.get(r, []) for r in record.allowed):
                if m := pattern.fullmatch(text):
                    found = {k: v.strip() for k, v in m.groupdict().items()}
                    matches.append(Match(window, size, wording, found.get("e", ""), found["v"]))
        return choose(matches)

    return extract


def _compile(wording: Wording) -> re.Pattern[str]:
    groups = {HEAD: "(?P<e>[^，]+?)", TAIL: "(?P<v>[^，]+?)"}
    return re.compile("".join(groups.get(t) or re.escape(t) for t in wording.tokens), re.IGNORECASE)


def _nearest_template(counts: Counts) -> Extractor:
    """For each clause the training wordings with most bigrams in common, aligned word by word."""
    index: dict[str, defaultdict[str, list[Wording]]] = {}
    sizes: dict[Wording, int] = {}
    for relation, wordings in learn(counts, at_least=2, most=200).items():
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
                    if relation in index:
                        shared.update(index[relation].get(gram, ()))
            near = [(n / sizes[w], w) for w, n in shared.items() if n / sizes[w] >= _OVERLAP]
            for _, wording in sorted(near, key=lambda x: (-x[0], x[1].relation, x[1].tokens))[:_CANDIDATES]:
                score, head, tail = align(tokens, wording.tokens)
                if score >= _FIT * len(wording.literals):
                    matches.append(Match(window, score, wording, head, tail))
        return choose(matches)

    return extract


def _bigrams(tokens: Tokens) -> frozenset[str]:
    """Neighbouring words, spaces left out, none across a mask; single words where there are no two."""
    words = [t.lower() for t in tokens if not t.isspace()]
    pairs = {f"{a}\x00{b}" for a, b in pairwise(words) if not {a, b} & {HEAD, TAIL}}
    return frozenset(pairs or set(words) - {HEAD, TAIL})


def align(tokens: Tokens, wording: Tokens) -> tuple[float, str, str]:
    """Lay a wording over a clause: `(score, head, tail)`.

    A literal that meets its word gives 1; one that is left out, or a word that nothing covers, costs 0.5;
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
        yield best[i - 1][j] - (0 if tokens[i - 1].isspace() else 0.5), "extra"


def _by_entity(train: Sequence[Question], names: Iterable[str]) -> Answerer:
    """The entity named in the question, then the training question about it with most text in common."""
    longest_first = sorted(set(names), key=lambda n: (-len(n), n))
    find = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    known: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for q in train:
        if m := find.search(q.question):
            known[m[0]].append((q.question.replace(m[0], "\x00"), q.answer))

    def answer(question: str) -> str:
        m = find.search(question)
        if m is None or m[0] not in known:
            return ""
        rest = question.replace(m[0], "\x00")
        size, reply = max(((_common(rest, other), reply) for other, reply in known[m[0]]), key=lambda x: x[0])
        return reply if size >= 2 else ""

    return answer


def _common(a: str, b: str) -> int:
    """Length of the longest common substring that does not cross the entity."""
    best = 0
    row = [0] * (len(b) + 1)
    for x in a:
        row = [0] + [row[j] + 1 if x == y and x != "\x00" else 0 for j, y in enumerate(b)]
        best = max(best, *row)
    return best


def _nearest_question(train: Sequence[Question]) -> Answerer:
    """The answer to the training question of highest cosine: character 2- and 3-grams, by rarity."""
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
    return [text[i : i + n] for n in (2, 3) for i in range(len(text) - n + 1)]
