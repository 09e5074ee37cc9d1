"""Stage `score`: predictions + gold → scores.json (95 % intervals, gates, baselines), samples.json.

Items about one entity stand or fall together: intervals resample entities, not items. Entities that are
told of together are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import Field

from microlm.core import stats
from microlm.core.artifact import Artifact, Workspace, stage
from microlm.core.errors import CheckFailed, UserError
from microlm.core.recipe import Recipe, StageRecipe, artifact_input
from microlm.core.records import Extraction, Prediction, Question
from microlm.eval import baselines, scoring
from microlm.eval.predict import DOCUMENTS, PREDICTIONS, answer_bounds, named
from microlm.eval.rows import ALL, Row, make_row, score_documents
from microlm.eval.samples import samples
from microlm.eval.scoring import ExtractionOutcome
from microlm.text.extraction import Bounds
from microlm.text.read import read_records
from microlm.text.sources import factbook


class Gates(Recipe):
    """The least value that each headline must reach; null does not ask."""

    question_exact: float | None = Field(default=None, description="exact answers to held-out questions")
    extraction_f1: float | None = Field(
        default=None, description="triple micro-F1, free decoding, mixed wordings"
    )
    constrained_valid: float | None = Field(
        default=None, description="schema-valid share with constrained decoding"
    )
    eos: float | None = Field(default=None, description="share of chats that stop before the token cap")


class ScoreRecipe(StageRecipe):
    """Judge predictions against the data that they were made from."""

    predictions: str = artifact_input(kinds=("predictions",), description="predictions artifact")
    data: str = artifact_input(kinds=("data",), description="the data artifact that was asked from")
    gates: Gates = Field(default=Gates(), description="limits of the headline scores")
    fail_on_gate: bool = Field(default=False, description="a missed gate is an error: exit 1, no artifact")
    baselines: bool = Field(default=True, description="answer the same items by regex and nearest template")
    baseline_records: int = Field(
        default=10_000, ge=1, description="training records that the extraction baselines learn from"
    )


Counted = tuple[int, int, int]
"""Matched, predicted, gold. A yes or no is (1 or 0, 1, 1): its F1 is the share of yes."""
Estimate = Callable[[Sequence[Counted]], stats.Interval]


@dataclass(frozen=True, slots=True)
class Scored:
    """One item's outcome with the groups that it counts in, and whom it is about (one name at least)."""

    kind: str
    lang: str
    entities: tuple[str, ...]
    outcome: Any
    source: str = ""


@dataclass(frozen=True)
class Gold:
    """What is right, by item id, and how long an answer may be."""

    questions: Mapping[str, Question]
    extraction: Mapping[str, Extraction]
    bounds: Bounds


HEADLINES: Mapping[str, tuple[str, str]] = {
    "question_exact": ("question_exact", ALL),
    "extraction_f1": ("extraction_f1", "mixed"),
    "extraction_f1_real": ("extraction_f1_real", "mixed"),
    "extraction_f1_invented": ("extraction_f1_invented", "mixed"),
    "extraction_f1_constrained": ("extraction_f1_constrained", "mixed"),
    "constrained_valid": ("extraction_schema_valid_constrained", ALL),
    "eos": ("eos", ALL),
    "bits_per_byte": ("bits_per_byte", ALL),
}
"""Headline → (row's name, kind); data without mixed wordings has its headline over all kinds."""


@stage("score", kind="scores", version=scoring.SCORER_VERSION)
def run(recipe: ScoreRecipe, work: Workspace) -> None:
    """Compare, summarise by kind and language, put baselines and gates beside."""
    predictions, data = work.inputs["predictions"], work.inputs["data"]
    _require_same_data(predictions, data)
    gold, rows = read_gold(data), list(read_records(predictions.file(PREDICTIONS), Prediction))
    found = score_predictions(rows, gold) + score_documents(predictions.path / DOCUMENTS)
    beside = score_baselines(recipe, rows, gold, data) if recipe.baselines else []
    headlines = headline_rows(found, beside)
    gates = check_gates(recipe.gates, headlines)
    head = {
        "schema": scoring.SCHEMA,
        "scorer": scoring.SCORER_VERSION,
        "headlines": headlines,
        "gates": gates,
    }
    tables = {"rows": [asdict(r) for r in found], "baselines": [asdict(r) for r in beside]}
    work.write_json("scores.json", head | {"gold_beyond_schema": beyond_schema(rows, gold)} | tables)
    chosen = samples(rows, gold.questions, gold.extraction)
    work.write_json("samples.json", {"schema": scoring.SCHEMA, "samples": chosen})
    missed = [_missed(g) for g in gates if not g["ok"]]
    work.metrics |= {h["name"]: h["value"] for h in headlines} | {"gates_missed": missed}
    if missed and recipe.fail_on_gate:
        raise CheckFailed(f"score: {'; '.join(missed)}")


def _missed(gate: Mapping[str, Any]) -> str:
    reached = "was not measured" if gate["value"] is None else f"is {gate['value']}"
    return f"{gate['gate']} {reached}, the limit is {gate['limit']}"


def read_gold(data: Artifact) -> Gold:
    """The held-out answers of a data artifact."""
    questions = named(read_records(data.file("questions/test.jsonl"), Question))
    records = named(read_records(data.file("extraction/test.jsonl"), Extraction))
    return Gold(questions, records, answer_bounds(data))


def _require_same_data(predictions: Artifact, data: Artifact) -> None:
    made_from = predictions.manifest["inputs"].get("data", {}).get("digest")
    if made_from is not None and made_from != data.digest:
        sentence = f"{predictions.url}: was predicted from other data than {data.url}"
        raise UserError(f"{sentence}; predict again, or name that data")


def score_predictions(predictions: Sequence[Prediction], gold: Gold) -> list[Row]:
    """All rows of all tasks; the same predictions and gold give the same rows."""
    tasks: dict[str, list[Prediction]] = {}
    for p in predictions:
        tasks.setdefault(p.task, []).append(p)
    rows: list[Row] = []
    if asked := tasks.get("question"):
        pairs = [(p.output, gold.questions[p.id]) for p in asked]
        right = [_scored(q, _one(scoring.exact(output, q.answer))) for output, q in pairs]
        rows += _grouped("question_exact", right, _share)
    for task, suffix in (("extraction", ""), ("extraction_constrained", "_constrained")):
        if asked := tasks.get(task):
            outcomes = [_judged(gold.extraction[p.id], p, gold.bounds) for p in asked]
            rows += extraction_rows(outcomes, suffix)
    if asked := tasks.get("chat"):
        ended = [Scored(ALL, ALL, (p.id,), _one(scoring.stopped(p.finish_reason))) for p in asked]
        rows += _grouped("eos", ended, _share)
    return rows


def beyond_schema(predictions: Iterable[Prediction], gold: Gold) -> int:
    """Constrained answers that could not be right, because the gold is wider than the schema."""
    asked = (gold.extraction[p.id] for p in predictions if p.task == "extraction_constrained")
    return sum(not scoring.fits(record, gold.bounds) for record in asked)


def _scored(record: Question | Extraction, outcome: Any) -> Scored:
    """An extraction record is about all heads of its gold; a record without a name is about itself."""
    alone = (f"\0{record.id}",)
    if isinstance(record, Question):
        return Scored(record.kind, record.lang, (record.entity,) if record.entity else alone, outcome)
    heads = tuple(dict.fromkeys(t.head for t in record.relation))
    return Scored(record.kind, record.lang, heads or alone, outcome, record.source)


def _judged(record: Extraction, p: Prediction, bounds: Bounds) -> Scored:
    return _scored(record, scoring.score_extraction(record, p.output, p.finish_reason, bounds))


def _one(yes: bool) -> Counted:
    return int(yes), 1, 1


def extraction_rows(outcomes: Sequence[Scored], suffix: str) -> list[Row]:
    """Quality first, then form: each measure by kind; F1 and the shares by language too."""
    counts: dict[str, Callable[[ExtractionOutcome], Counted]] = {
        "f1": lambda o: (o.triples.matched, o.triples.predicted, o.triples.gold),
        # F1 of (matched, n, n) is matched / n: precision and recall need no formula of their own
        "precision": lambda o: (o.triples.matched, o.triples.predicted, o.triples.predicted),
        "recall": lambda o: (o.triples.matched, o.triples.gold, o.triples.gold),
        "entity_f1": lambda o: (o.heads.matched, o.heads.predicted, o.heads.gold),
        "unsupported": lambda o: (o.unsupported, o.triples.predicted, o.triples.predicted),
    }
    shares: dict[str, Callable[[ExtractionOutcome], bool]] = {
        "parsed": lambda o: o.parsed,
        "schema_valid": lambda o: o.schema_valid,
        "truncated": lambda o: o.truncated,
    }
    rows: list[Row] = []
    for name, triple in counts.items():
        counted = [replace(s, outcome=triple(s.outcome)) for s in outcomes]
        if name == "f1":
            rows += f1_rows(counted, suffix)
        else:  # the headline alone is told by language: each interval is 2,000 resamples
            rows += _grouped(f"extraction_{name}{suffix}", [replace(s, lang=ALL) for s in counted], _f1)
    for name, share in shares.items():
        picked = [replace(s, outcome=_one(share(s.outcome))) for s in outcomes]
        rows += _grouped(f"extraction_{name}{suffix}", picked, _share)
    return rows


def f1_rows(counted: Sequence[Scored], suffix: str = "") -> list[Row]:
    """Triple F1 over all records, then over those about real and about invented entities, where known."""
    rows = _grouped(f"extraction_f1{suffix}", counted, _f1)
    for origin, source in (("real", factbook.REAL), ("invented", factbook.INVENTED)):
        members = [s for s in counted if s.source == source]
        rows += _grouped(f"extraction_f1_{origin}{suffix}", members, _f1) if members else []
    return rows


def _grouped(name: str, items: Sequence[Scored], estimate: Estimate) -> list[Row]:
    """The row over all items, then by kind, by language and by both where there are several."""
    kinds, langs = sorted({s.kind for s in items} - {ALL}), sorted({s.lang for s in items} - {ALL})
    groups = [(ALL, ALL), *((k, ALL) for k in kinds)]
    if len(langs) > 1:
        groups += [(k, lang) for k in (ALL, *kinds) for lang in langs]
    rows = []
    for kind, lang in groups:
        members = [s for s in items if kind in (ALL, s.kind) and lang in (ALL, s.lang)]
        if members:
            sums = by_entity(members)
            rows.append(make_row(name, kind, lang, estimate(sums), (len(members), len(sums)), "share"))
    return rows


def by_entity(items: Sequence[Scored]) -> list[Counted]:
    """The counts of the items of each group that shares no entity with another: what intervals resample."""
    sums: dict[str, Counted] = {}
    for group, s in zip(scoring.groups([s.entities for s in items]), items, strict=True):
        a, b, c = sums.get(group, (0, 0, 0))
        sums[group] = (a + s.outcome[0], b + s.outcome[1], c + s.outcome[2])
    return list(sums.values())


def _f1(sums: Sequence[Counted]) -> stats.Interval:
    found = stats.micro_f1_ci(sums)
    return found if len(sums) > 1 else stats.Interval(found.value, 0.0, 1.0)  # one tells nothing of others


def _share(sums: Sequence[Counted]) -> stats.Interval:
    """Wilson's interval where each item has its own entity, or all agree: a bootstrap has no width."""
    right, n = sum(s[0] for s in sums), sum(s[1] for s in sums)
    if len(sums) == n or right in (0, n):
        return stats.proportion_ci(right * len(sums) // n, len(sums))
    return _f1(sums)


def score_baselines(
    recipe: ScoreRecipe, predictions: Sequence[Prediction], gold: Gold, data: Artifact
) -> list[Row]:
    """The same items answered without a model, learnt from the training split of the same data."""
    records = list(read_records(data.file("extraction/train.jsonl"), Extraction))
    questions = list(read_records(data.file("questions/train.jsonl"), Question))
    heads = (t.head for r in records for t in r.relation)
    names = [*heads, *(q.entity for q in questions if q.entity)]
    asked = [gold.questions[p.id] for p in predictions if p.task == "question"]
    texts = [gold.extraction[p.id] for p in predictions if p.task == "extraction"]
    rows: list[Row] = []
    if asked:
        for name, answer in baselines.answerers(questions, names).items():
            right = [_scored(q, _one(scoring.exact(answer(q.question), q.answer))) for q in asked]
            rows += [replace(r, by=name) for r in _grouped("question_exact", right, _share)]
    if texts:
        for name, extract in baselines.extractors(records[: recipe.baseline_records]).items():
            counts = [scoring.count(extract(r), scoring.gold_triples(r)) for r in texts]
            items = [_scored(r, (c.matched, c.predicted, c.gold)) for r, c in zip(texts, counts, strict=True)]
            rows += [replace(r, by=name) for r in f1_rows(items)]
    return rows


def headline_rows(rows: Iterable[Row], beside: Iterable[Row]) -> list[dict[str, Any]]:
    """The few rows that a summary shows, each with its baselines."""
    found = {(r.name, r.kind): r for r in rows if r.lang == ALL}
    others = {(r.name, r.kind, r.by): r.value for r in beside if r.lang == ALL}
    headlines = []
    for title, (name, kind) in HEADLINES.items():
        row = found.get((name, kind)) or found.get((name, ALL))
        if row is not None:
            base = row.name.removesuffix("_constrained")
            values = {b: others.get((base, row.kind, b)) for b in baselines.NAMES}
            headlines.append({**asdict(row), "row": row.name, "name": title, "baselines": values})
    return headlines


def check_gates(gates: Gates, headlines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each gate that is set, with the value reached; a headline that was not measured misses its gate."""
    values = {h["name"]: h["value"] for h in headlines}
    limits = {name: limit for name, limit in gates.model_dump().items() if limit is not None}
    return [
        {
            "gate": name,
            "value": values.get(name),
            "limit": limit,
            "ok": values.get(name, float("-inf")) >= limit,
        }
        for name, limit in limits.items()
    ]
