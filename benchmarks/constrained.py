"""What a constraint costs: compiling it, a matcher, and per token the mask and the step of the grammar.

Answers that fit are followed token by token with the ready tokenizer of 6400 tokens, each through a matcher
of its own: CPU time, so that a busy machine changes little. The schemas are the quickstart's (built-in
factbook), and those of --data (schema_zh_typed.json, ie.jsonl.zst) where it is there, else null; the same
with every string copied from the record's text, or from a text of 2,000 characters. --quick takes fewer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from parts import result_file
from parts.inputs import real_lines
from parts.result_file import Rows

from microlm.core.records import Constraint, Extraction, Triple
from microlm.engine.grammar import Grammars
from microlm.text import extraction
from microlm.text.extraction import Bounds
from microlm.text.sources import factbook
from microlm.text.sources.factbook import FactbookSizes
from microlm.text.tokenizer import Tokenizer

READY = Path(__file__).parents[1] / "microlm" / "ready" / "zh-6400"
PACKAGES = ("microlm", "llguidance", "numpy")
GOALS: dict[str, result_file.Goal] = {
    "token_us.quickstart": (180.0, "min", "issue 6: 10 % of the 1.8 ms that bf16 weights take at batch 1"),
    "token_us.quickstart.copied": (180.0, "min", "the same"),
}
LONG = 2_000  # characters to copy from
TOGETHER = 32
Asked = tuple[Constraint, list[int]]


def main() -> None:
    """Measure and print."""
    options = parse_options()
    rows: Rows = []
    tokenizer = Tokenizer.load(READY)
    count = 30 if options.quick else 300
    for name, records in (("quickstart", made(count)), ("typed", real(options.data, count))):
        for kind in ("", ".copied", f".copied_{LONG}"):
            asked = list(questions(tokenizer, records, kind))
            measure(rows, name + kind, tokenizer, asked)
    result = result_file.result("constrained", rows, GOALS, PACKAGES, options.quick)
    result_file.write(result, options.out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def made(count: int) -> list[Extraction]:
    """Held-out records of the factbook."""
    sizes = {"documents": 1, "questions": 0, "extraction": 100, "reading": 0, "chat": 0, "preferences": 0}
    return factbook.generate(0, None, FactbookSizes(**sizes, test_extraction=count)).extraction_test[:count]


def real(folder: Path, count: int) -> list[Extraction]:
    """Real records, asked for all relations of their topic; none where the data is not there."""
    if not (folder / "ie.jsonl.zst").exists():
        return []
    topics = json.loads((folder / "schema_zh_typed.json").read_text(encoding="utf-8"))
    lines = map(json.loads, real_lines(folder / "ie.jsonl.zst", count * 4_000))
    return [
        Extraction(
            line["id"], line["cate"], line["text"],
            tuple(Triple(t["head"], t["relation"], t["tail"]) for t in line["relation"]),
            tuple(topics[line["cate"]]),
        )
        for line in lines
        if line["cate"] in topics
    ][:count]  # fmt: skip


def questions(tokenizer: Tokenizer, records: list[Extraction], kind: str) -> Iterator[Asked]:
    """The constraint of each record, and the ids of its answer."""
    bounds = Bounds().widened(records)
    more = "".join(r.text for r in records)
    for record in records:
        schema = extraction.json_schema(record.allowed, bounds, copied=bool(kind))
        text = None if not kind else record.text if kind == ".copied" else (record.text + more)[:LONG]
        answer = extraction.answer(record.relation, record.allowed)
        ids = [*tokenizer.encode(answer), tokenizer.eos_id]
        yield Constraint("json_schema", json.dumps(schema, ensure_ascii=False), text), ids


def measure(rows: Rows, name: str, tokenizer: Tokenizer, asked: list[Asked]) -> None:
    """Follow every answer; all of its tokens must be allowed."""
    grammars = Grammars(tokenizer)
    found: dict[str, list[float]] = {
        key: [] for key in ("compile_ms", "matcher_us", "mask_us", "consume_us", "token_us", "wait_us")
    }
    for constraint, ids in asked:
        before = time.process_time()
        grammars.matcher(constraint)
        found["compile_ms"].append((time.process_time() - before) * 1e3)
        before = time.process_time()
        matcher = grammars.matcher(constraint)
        found["matcher_us"].append((time.process_time() - before) * 1e6)
        masks = steps = 0.0
        for token in ids:
            before = time.process_time()
            allowed = matcher.allowed()
            masks += time.process_time() - before
            assert allowed[token], f"{name}: {tokenizer.token_bytes[token]!r} is not allowed"
            before = time.process_time()
            matcher.consume(token)
            steps += time.process_time() - before
        found["mask_us"].append(masks / len(ids) * 1e6)
        found["consume_us"].append(steps / len(ids) * 1e6)
        found["token_us"].append((masks + steps) / len(ids) * 1e6)
    for first in range(0, len(asked), TOGETHER):
        several = [grammars.matcher(constraint) for constraint, _ in asked[first : first + TOGETHER]]
        started = time.perf_counter()
        grammars.begin(several).wait()
        found["wait_us"].append((time.perf_counter() - started) / len(several) * 1e6)
    units = {"compile_ms": "CPU ms", "wait_us": f"us of {TOGETHER} first masks, each, by the clock"}
    for key, values in found.items():
        add(rows, f"{key}.{name}", values, units.get(key, "CPU us, mean of an answer's tokens"))
    add(rows, f"answers.{name}", [float(len(asked))] if asked else [], "answers")


def add(rows: Rows, name: str, values: list[float], unit: str) -> None:
    """Enter the median of some figures; null where there are none."""
    value = round(statistics.median(values), 3) if values else None
    ends = (round(min(values), 3), round(max(values), 3)) if values else (None, None)
    row = {"name": name, "value": value, "unit": unit, "runs": len(values)}
    rows.append(row | {"min": ends[0], "max": ends[1]})


if __name__ == "__main__":
    main()
