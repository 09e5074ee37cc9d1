"""What is held out of training, once the corpus is written: tests, prompts, the proof that none leaked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from microlm.core.artifact import Workspace
from microlm.core.errors import UserError
from microlm.core.records import Conversation, Extraction, to_json
from microlm.text import sources
from microlm.text.audit import Audit
from microlm.text.clean import tidy
from microlm.text.corpus.refine import Schema
from microlm.text.dedup import record_digest
from microlm.text.read import Drop
from microlm.text.sources.factbook import Factbook
from microlm.text.split import SPLITS, Kind, held_out_digests, records_of, rewrite

MAX_CHATS = 200
_BENCHMARK_KEYS = ("text", "question", "context", "prompt", "query", "instruction", "input")


def require(name: str, place: str = "data.decontaminate.benchmarks") -> Path:
    """A file that a recipe names, or a UserError."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{place}: {name}: no such file; check the path")
    return path


def benchmark_texts(names: list[str]) -> Iterator[str]:
    """The texts of benchmark files: what their lines ask and what they give to read."""
    for name in names:
        found = False
        for block in sources.blocks(sources.parse(f"jsonl:{require(name)}")):
            for place, data in block.objects():
                if isinstance(data, Drop):
                    raise UserError(f"{place}: {data.detail}; mend the benchmark file")
                for key in _BENCHMARK_KEYS:
                    if isinstance(value := data.get(key), str) and value.strip():
                        found = True
                        yield value
        if not found:
            keys = ", ".join(_BENCHMARK_KEYS)
            raise UserError(f"{name}: no line has a text under {keys}; give a JSONL file with one of them")


def write(
    work: Workspace, book: Factbook | None, kinds: list[Kind], own: frozenset[str], audit: Audit
) -> None:
    """Questions and test extraction of the factbook; prompts for the stop check."""
    asks = "conversations" in kinds and "question" not in own
    questions = (book.questions_train, book.questions_test) if book and asks else ([], [])
    for split, items in zip(("train", "test"), questions, strict=True):
        work.write_jsonl(f"questions/{split}.jsonl", [to_json(q) for q in items])
    if book and "extraction" in kinds:
        test = [*records_of(work.path, "extraction", "test"), *map(tidy, book.extraction_test)]
        work.write_jsonl("extraction/test.jsonl", [to_json(e) for e in test])
        for record in book.extraction_test:
            audit.tallies["read"].keep()
            audit.survey.observe("extraction", "test", record)
    if book and "conversations" in kinds and "chat" not in own:
        prompts = [Conversation(tuple(chat)) for chat in book.chats]
    else:
        prompts = list(_prompts(work.path))
    kept = ("messages", "tools")
    rows = ({key: value for key, value in to_json(chat).items() if key in kept} for chat in prompts)
    work.write_jsonl("chats/test.jsonl", list(rows))


def _prompts(root: Path) -> Iterator[Conversation]:
    """The beginnings of held-out conversations, up to the last question."""
    for number, conversation in enumerate(records_of(root, "conversations", "validation")):
        if number >= MAX_CHATS:
            return
        asked = [i for i, m in enumerate(conversation.messages) if m.role == "user"]
        if asked:
            yield Conversation(conversation.messages[: asked[-1] + 1], tools=conversation.tools)


def complete_extraction(work: Workspace, schema: Schema) -> None:
    """Write schema.json; records that do not say what may be asked get the relations of their topic."""
    work.write_json("schema.json", {topic: dict(sorted(schema[topic].items())) for topic in sorted(schema)})

    def complete(record: Extraction) -> Extraction:
        return (
            record if record.allowed else replace(record, allowed=tuple(sorted(schema.get(record.cate, {}))))
        )

    for split in SPLITS["extraction"]:
        if any(not record.allowed for record in records_of(work.path, "extraction", split)):
            rewrite(work.path, "extraction", split, complete)


def leakage(root: Path) -> dict[str, int]:
    """Training records whose digest is held out, counted in the files: tested, not trusted.

    Documents, which are many, are counted while they are written.
    """
    found: dict[str, int] = {}
    for kind in SPLITS:
        if kind != "documents":
            held_out = held_out_digests(root, kind)
            train = records_of(root, kind, "train") if len(held_out) else iter(())
            found[kind] = sum(record_digest(record) in held_out for record in train)
    return found
