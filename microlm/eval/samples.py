"""Samples to read, chosen by rule and not by taste: the first right and wrong answers of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from microlm.core.records import Extraction, Prediction, Question
from microlm.eval import scoring
from microlm.text import extraction

EACH = 3


def samples(
    predictions: Sequence[Prediction], questions: Mapping[str, Question], records: Mapping[str, Extraction]
) -> list[dict[str, Any]]:
    """Per task the first `EACH` right and wrong ones by id; of chats, which have no gold, twice as many."""
    taken: dict[tuple[str, bool | None], int] = {}
    chosen = []
    for p in predictions:
        gold, right = _judge(p, questions, records)
        number = taken[p.task, right] = taken.get((p.task, right), 0) + 1
        if number <= (EACH if right is not None else 2 * EACH):
            told = {"task": p.task, "id": p.id, "right": right, "before": p.extra.get("before", [])}
            answer = {"output": p.output, "finish_reason": p.finish_reason, "gold": gold}
            chosen.append({**told, "prompt": p.prompt, **answer})
    return sorted(chosen, key=lambda s: (s["task"], s["right"] is not True, s["id"]))


def _judge(
    p: Prediction, questions: Mapping[str, Question], records: Mapping[str, Extraction]
) -> tuple[str | None, bool | None]:
    """The gold answer as text, and whether this one is right."""
    if p.task == "question":
        answer = questions[p.id].answer
        return answer, scoring.exact(p.output, answer)
    if p.task in ("extraction", "extraction_constrained"):
        record = records[p.id]
        gold = extraction.answer(record.relation, record.allowed)
        return gold, extraction.parse(p.output) == scoring.gold_triples(record)
    return None, None
