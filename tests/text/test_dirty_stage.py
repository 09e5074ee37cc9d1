"""The whole stage on real text with labelled dirt: duplicates, benchmarks inside documents, broken lines."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from shared_data import raw_lines

from microlm.text.prepare import PrepareRecipe, run

pytestmark = [pytest.mark.shared, pytest.mark.slow, pytest.mark.timeout(600)]
MIN_RECALL, MAX_FALSE_DROPS = 0.95, 0.01
BENCHMARKS = ("eval_mc", "eval_qa")
BROKEN = (
    "invalid_utf8_bytes_in_line",
    "truncated_json_line",
    "missing_text_key",
    "null_text",
)


class Outcome:
    """Lines by label, their texts, what the stage keeps (number → text), its audit."""

    def __init__(self, folder: Path) -> None:
        self.lines: dict[tuple[str, str], list[int]] = defaultdict(list)
        for label in map(json.loads, raw_lines("pretrain_dirty_labels.jsonl.zst")):
            for kind in label["kinds"]:
                self.lines[label["origin"], kind].append(label["line"])
        self.texts: dict[int, str] = {}
        source = folder / "dirty.jsonl"
        self.raw = originals_and_dirt()
        source.write_bytes(b"".join(self._named(*line) for line in enumerate(self.raw)))
        for name in BENCHMARKS:
            lines = b"\n".join(raw_lines(f"{name}.jsonl.zst"))
            (folder / f"{name}.jsonl").write_bytes(lines)
        recipe: dict[str, Any] = {
            "source": f"jsonl:{source}",
            "fill": "none",
            "validation_share": 0.0,
            "test_share": 0.0,
            "decontaminate": {"benchmarks": [str(folder / f"{name}.jsonl") for name in BENCHMARKS]},
        }
        artifact = run(PrepareRecipe.model_validate({"out": str(folder / "data"), **recipe}))
        with (artifact.path / "documents/train.jsonl").open(encoding="utf-8") as train:
            records = list(map(json.loads, train))
        self.kept = {int(record["source"]): record["text"] for record in records}
        self.steps = artifact.json("logs/audit.json")["steps"]

    def _named(self, number: int, line: bytes) -> bytes:
        """The line with its number for a source; one that is no record stays as it is."""
        try:
            record = json.loads(line)
            record["source"] = str(number)
        except ValueError:
            return line + b"\n"
        if isinstance(text := record.get("text"), str):
            self.texts[number] = text
        return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"

    def found(self, pairs: list[tuple[int, int]]) -> float:
        """The share of pairs of which at most one is kept."""
        return sum(not {*pair} <= self.kept.keys() for pair in pairs) / len(pairs)


def originals_and_dirt() -> list[bytes]:
    """The dirty lines, and behind them the originals of the natural duplicates of `pretrain`."""
    lines = list(raw_lines("pretrain_dirty.jsonl.zst"))
    labels = map(json.loads, raw_lines("pretrain_dirty_labels.jsonl.zst"))
    repeated = {
        json.loads(lines[label["line"]])["text"]
        for label in labels
        if "exact_duplicate_of_pretrain" in label["kinds"]
    }
    bare = {said(text) for text in repeated}
    return [
        *lines,
        *(line for line in raw_lines("pretrain.jsonl.zst") if said(json.loads(line)["text"]) in bare),
    ]


def said(text: str) -> str:
    """The letters and digits of a text."""
    return "".join(c for c in text.lower() if c.isalnum())


def grams(text: str) -> set[str]:
    bare = said(text)
    return {bare[i : i + 5] for i in range(max(1, len(bare) - 4))}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("dirty"))


def test_one_of_each_exact_pair_goes(outcome: Outcome) -> None:
    same: dict[str, list[int]] = defaultdict(list)
    for number in outcome.lines["injected", "exact_duplicate_pair"]:
        same[said(outcome.texts[number])].append(number)
    pairs = [(a, b) for a, b in same.values()]
    assert len(pairs) == 249 and outcome.found(pairs) == 1


def test_one_of_each_near_pair_goes(outcome: Outcome) -> None:
    sets = {n: grams(outcome.texts[n]) for n in outcome.lines["injected", "near_duplicate_pair"]}

    def likeness(a: int, b: int) -> float:
        return len(sets[a] & sets[b]) / len(sets[a] | sets[b])

    nearest = {a: max((b for b in sets if b != a), key=lambda b: likeness(a, b)) for a in sets}
    pairs = [(a, b) for a, b in nearest.items() if a < b]
    assert len(pairs) == 149 and outcome.found(pairs) >= MIN_RECALL


def test_exact_duplicates_of_the_corpus_go(outcome: Outcome) -> None:
    same: dict[str, list[int]] = defaultdict(list)
    for number, text in outcome.texts.items():
        same[said(text)].append(number)
    for number in outcome.lines["natural", "exact_duplicate_of_pretrain"]:
        twins = set(same[said(outcome.texts[number])])
        assert len(twins) > 1 and len(outcome.kept.keys() & twins) <= 1


def test_benchmarks_inside_documents_are_found(outcome: Outcome) -> None:
    lines = outcome.lines["injected", "benchmark_contamination"]
    assert len(lines) == 60
    assert sum(n not in outcome.kept for n in lines) / len(lines) >= MIN_RECALL


def test_broken_lines_are_counted_with_their_reasons(outcome: Outcome) -> None:
    counts = {kind: outcome.lines["injected", kind] for kind in BROKEN}
    reasons = {r["reason"]: r["records"] for r in outcome.steps["read"]["reasons"]}
    assert reasons == {
        "invalid_utf8": sum(is_broken(outcome.raw[n]) for n in counts["invalid_utf8_bytes_in_line"]),
        "invalid_json": len(counts["truncated_json_line"]),
        "missing_field:text (found content, source)": len(counts["missing_text_key"]),
        "text_null": len(counts["null_text"]),
        "text_empty": sum(not text.strip() for text in outcome.texts.values()),
    }
    assert reasons["invalid_utf8"] >= MIN_RECALL * len(counts["invalid_utf8_bytes_in_line"])
    assert reasons["text_empty"] >= len(outcome.lines["injected", "empty_text"])


def is_broken(line: bytes) -> bool:
    """Whether a line is not UTF-8; one of those labelled so is."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def test_clean_lines_are_kept_unless_another_says_the_same(outcome: Outcome) -> None:
    """Many of them are the base of a line with injected dirt: of the two one stays."""
    lines = [n for n in outcome.lines["natural", "clean"] if n in outcome.texts]
    dropped = [grams(outcome.texts[n]) for n in lines if n not in outcome.kept]
    others = list(map(grams, outcome.kept.values()))
    lonely = [one for one in dropped if max(len(one & b) / len(one | b) for b in others) < 0.75]
    assert len(lines) > 600 and len(lonely) <= MAX_FALSE_DROPS * len(lines)
