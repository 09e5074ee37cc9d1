"""Stage `data`: raw text in, a corpus that can be trusted out.

Enters: the sources named in the recipe. Leaves: documents, conversations, extraction, preferences,
questions and chats, each in its splits, and the audit of it all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from microlm.core.artifact import Workspace, hash_file, stage
from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.core.recipe import StageRecipe, unkeyed
from microlm.core.records import Conversation, Document, Extraction, Question, to_json
from microlm.text import sources
from microlm.text.audit import Audit, page
from microlm.text.clean import clean, rules, tidied, tidy
from microlm.text.dedup import DigestSet, digest, record_digest
from microlm.text.read import Record, read_records
from microlm.text.sources import Source, factbook
from microlm.text.sources.factbook import Factbook, FactbookSizes
from microlm.text.split import (
    SPLITS,
    Kind,
    Shelves,
    check_shares,
    held_out_digests,
    kind_of,
    move_one,
    records_of,
    rewrite,
    split_of,
)
from microlm.text.teach import teach_extraction

MAX_CHATS = 200
Schema = dict[str, dict[str, dict[str, str]]]  # topic → relation → {head_type, tail_type}


class PrepareRecipe(StageRecipe):
    """From raw sources to cleaned, deduplicated, split and audited records."""

    source: str | list[str] = unkeyed(
        "factbook",
        description="factbook, jsonl:PATH, text:PATH|FOLDER, hf:NAME[:split], ms:NAME[:split], or a list",
    )
    entities: str | None = unkeyed(None, description="entity file that replaces the factbook's own tables")
    strict: bool = Field(
        False, description="stop at the first faulty record instead of dropping and counting it"
    )
    min_chars: int = Field(
        12, ge=0, description="shorter documents are dropped, in characters after cleaning"
    )
    max_chars: int = Field(1_000_000, ge=1, description="longer documents are dropped, in characters")
    validation_share: float = Field(
        0.02, ge=0, lt=1, description="share of documents and conversations for validation"
    )
    test_share: float = Field(
        0.02, ge=0, lt=1, description="share of documents and of a user's extraction for the test"
    )
    fill: Literal["factbook", "none"] = Field(
        "factbook", description="where the kinds of records come from that the sources do not hold"
    )
    factbook: FactbookSizes = Field(
        FactbookSizes.model_validate({}), description="how many records the factbook composes"
    )


def fingerprint(recipe: PrepareRecipe) -> dict[str, Any]:
    """The bytes that the result depends on: every file of the user, and the factbook's tables if used."""
    words = [sources.parse(word) for word in _words(recipe)]
    found: dict[str, Any] = {"sources": [[w.kind, w.split, w.fingerprint()] for w in words]}
    if recipe.entities:
        found["entities"] = hash_file(_entity_file(recipe.entities))
    if recipe.fill == "factbook" or sources.FACTBOOK in _words(recipe):
        found["tables"] = [[p.name, hash_file(p)] for p in factbook.table_files()]
    return found


@stage("data", "data", version=2, fingerprint=fingerprint)
def run(recipe: PrepareRecipe, work: Workspace) -> None:
    """Read → clean → dedup → split → write (the user's sources, then what the factbook fills in) → audit."""
    check_shares(recipe.validation_share, recipe.test_share)
    audit = Audit()
    with Shelves(work.path) as shelves:
        intake = Intake(recipe, audit, shelves)
        schema: Schema = {}
        intake.take(note_schema(read_sources(recipe, audit), schema))
        kinds = kinds_to_fill(recipe, shelves)
        book = factbook.generate(recipe.seed, recipe.entities, recipe.factbook) if kinds else None
        own = frozenset() if sources.FACTBOOK in _words(recipe) else frozenset(intake.tasks)
        if book:
            parts = read_factbook(book, kinds, own, audit)
            intake.take(parts, test_share=0)  # its test records come composed
    require_documents(audit, shelves)
    ensure_held_out(work.path, recipe)
    write_held_out(work, book, kinds, own, audit)
    complete_extraction(work, merged(schema, book.schema if book and "extraction" in kinds else {}))
    for _ in range(teach_extraction(work.path)):
        audit.tallies["read"].keep()
    decontaminate(work.path, audit, intake.seen)
    survey(work.path, audit)
    write_audit(work, audit, kinds if book else [])


class Intake:
    """The walk of a record from its source to its file: cleaned, unique, split."""

    def __init__(self, recipe: PrepareRecipe, audit: Audit, shelves: Shelves) -> None:
        self.seen: dict[Kind, DigestSet] = {kind: DigestSet() for kind in SPLITS}
        self.tasks: set[str] = set()  # what the records taken so far teach
        self._recipe, self._audit, self._shelves = recipe, audit, shelves

    def take(self, records: Iterable[Record], test_share: float | None = None) -> None:
        """Write what is kept of `records`; `test_share` of the extraction (the recipe's) is held out."""
        recipe = self._recipe
        shares: dict[Kind, tuple[float, float]] = {
            "documents": (recipe.validation_share, recipe.test_share),
            "conversations": (recipe.validation_share, 0.0),
            "extraction": (0.0, recipe.test_share if test_share is None else test_share),
            "preferences": (0.0, 0.0),
        }
        for record, key in self._unique(self._cleaned(records)):
            if isinstance(record, Conversation | Extraction):
                self.tasks.add(record.task if isinstance(record, Conversation) else "extraction")
            self._shelves.put(record, split_of(key, *shares[kind_of(record)]))

    def _cleaned(self, records: Iterable[Record]) -> Iterator[Record]:
        steps = rules(self._recipe.min_chars, self._recipe.max_chars)
        tally = self._audit.tallies["clean"]
        for record in records:
            if isinstance(record, Document):
                document, reason = clean(record, steps, self._audit.effects)
                after: Record = document
                glimpse = f"{document.source}: {document.text[:60]!r}"
            else:
                after, reason = tidied(record)
                glimpse = record.source
            if reason:
                tally.drop(reason, glimpse)
                continue
            tally.keep()
            yield after

    def _unique(self, records: Iterable[Record]) -> Iterator[tuple[Record, bytes]]:
        tally = self._audit.tallies["dedup"]
        for record in records:
            kind, key = kind_of(record), record_digest(record)
            if self.seen[kind].add(key):
                tally.keep()
                yield record, key
            else:
                tally.drop(f"duplicate_{kind}", record.source)


def _words(recipe: PrepareRecipe) -> list[str]:
    words = [recipe.source] if isinstance(recipe.source, str) else recipe.source
    if not words:
        raise UserError("data.source: is an empty list; name at least one source")
    return words


def _entity_file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"data.entities: {name}: no such file; check the path")
    return path


def read_sources(recipe: PrepareRecipe, audit: Audit) -> Iterator[Record]:
    """The records of the user's sources, in the order of the recipe, with progress on the way."""
    users = [s for s in map(sources.parse, _words(recipe)) if s.kind != sources.FACTBOOK]
    for source in users:
        yield from _read_source(source, recipe, audit)


def _read_source(source: Source, recipe: PrepareRecipe, audit: Audit) -> Iterator[Record]:
    tally = audit.tallies["read"]
    with Progress(f"data {source.word}", source.size_bytes(), "bytes") as bar:

        def advance(count: int) -> None:
            bar.update(count, kept=str(tally.kept), dropped=str(tally.dropped.total()))

        yield from sources.read(source, tally, recipe.strict, advance)


def kinds_to_fill(recipe: PrepareRecipe, shelves: Shelves) -> list[Kind]:
    """The kinds of records that come from the factbook: all if it is a source, else the missing ones."""
    if sources.FACTBOOK in _words(recipe):
        return list(SPLITS)
    missing: list[Kind] = [k for k in SPLITS if k == "conversations" or not shelves.counts[k]]
    return missing if recipe.fill == "factbook" else []


def read_factbook(book: Factbook, kinds: list[Kind], own: frozenset[str], audit: Audit) -> Iterator[Record]:
    """The factbook's training records of the given kinds, less the tasks that the user's records teach."""
    parts: dict[Kind, Iterable[Record]] = {
        "documents": book.documents,
        "conversations": [c for c in book.conversations if c.task not in own],
        "extraction": book.extraction_train,
        "preferences": book.preferences,
    }
    with Progress("data factbook", sum(len(list(parts[kind])) for kind in kinds), "records") as bar:
        for kind in kinds:
            for record in parts[kind]:
                audit.tallies["read"].keep()
                bar.update(1)
                yield record


def require_documents(audit: Audit, shelves: Shelves) -> None:
    """An error when cleaning left nothing at all."""
    if not shelves.counts.total():
        reasons = audit.tallies["clean"].dropped.most_common(3)
        why = ", ".join(f"{reason} {count}" for reason, count in reasons) or "no reason was counted"
        raise UserError(
            f"data.source: nothing is left of {audit.tallies['read'].read} records after cleaning"
            f" ({why}); relax min_chars and max_chars, or choose another source"
        )


def ensure_held_out(root: Path, recipe: PrepareRecipe) -> None:
    """A small corpus can miss a split by chance: give it one record."""
    if recipe.validation_share:
        move_one(root, "documents", "validation")
        move_one(root, "conversations", "validation")
    if recipe.test_share:
        move_one(root, "documents", "test")


def write_held_out(
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
        for _ in book.extraction_test:
            audit.tallies["read"].keep()
    chats = (
        book.chats if book and "conversations" in kinds and "chat" not in own else list(_prompts(work.path))
    )
    work.write_jsonl("chats/test.jsonl", [{"messages": [to_json(m) for m in chat]} for chat in chats])


def _prompts(root: Path) -> Iterator[tuple[Any, ...]]:
    """The beginnings of held-out conversations, up to the last question."""
    for number, conversation in enumerate(records_of(root, "conversations", "validation")):
        if number >= MAX_CHATS:
            return
        asked = [i for i, m in enumerate(conversation.messages) if m.role == "user"]
        if asked:
            yield conversation.messages[: asked[-1] + 1]


def note_schema(records: Iterable[Record], schema: Schema) -> Iterator[Record]:
    """The same records; the relations of extraction records are entered into `schema` as they go by."""
    for record in records:
        if isinstance(record, Extraction):
            for t in record.relation:
                types = {"head_type": t.head_type, "tail_type": t.tail_type}
                schema.setdefault(record.cate, {}).setdefault(t.relation, types)
        yield record


def merged(one: Schema, other: Schema) -> Schema:
    """Both schemas; where they speak of the same relation, the first counts."""
    return {topic: other.get(topic, {}) | one.get(topic, {}) for topic in (other | one)}


def complete_extraction(work: Workspace, schema: Schema) -> None:
    """Write schema.json; records that do not say what may be asked get the relations of their topic."""
    work.write_json("schema.json", schema)

    def complete(record: Extraction) -> Extraction:
        return record if record.allowed else replace(record, allowed=tuple(schema.get(record.cate, {})))

    for split in SPLITS["extraction"]:
        if any(not record.allowed for record in records_of(work.path, "extraction", split)):
            rewrite(work.path, "extraction", split, complete)


def decontaminate(root: Path, audit: Audit, seen: Mapping[Kind, DigestSet]) -> None:
    """Take training records out that say what a held-out extraction text or question says."""
    texts = [digest(e.text) for e in records_of(root, "extraction", "test")]
    asked = [digest(q.question) for q in read_records(root / "questions/test.jsonl", Question)]
    held_out = DigestSet()
    for key in (*texts, *asked):
        held_out.add(key)
    tally = audit.tallies["decontaminate"]

    def keep(record: Record) -> Record | None:
        said = (
            [digest(m.content) for m in record.messages]
            if isinstance(record, Conversation)
            else [record_digest(record)]
        )
        if any(key in held_out for key in said):
            tally.drop(f"held_out_{kind_of(record)}", record.source)
            return None
        tally.keep()
        return record

    if len(held_out):
        rewrite(root, "conversations", "train", keep)
    for kind in ("documents", "extraction"):
        if any(key in seen[kind] for key in texts):  # most corpora are spared this walk
            rewrite(root, kind, "train", keep)


def survey(root: Path, audit: Audit) -> None:
    """Count what lies in the files, and training records whose digest is held out: tested, not trusted."""
    for kind, splits in SPLITS.items():
        held_out = held_out_digests(root, kind)
        leaked = 0
        for split in splits:
            for record in records_of(root, kind, split):
                audit.observe(kind, split, record)
                leaked += split == "train" and record_digest(record) in held_out
        audit.leakage[kind] = leaked


def write_audit(work: Workspace, audit: Audit, filled: list[Kind]) -> None:
    """The audit as JSON and as a page; a leak is an error of ours."""
    audit.filled = list(filled)
    audit.check()
    found = audit.to_json()
    work.licences.update(audit.licences)
    work.metrics.update(
        read=audit.tallies["read"].read, written=audit.total_written(), leakage=sum(audit.leakage.values())
    )
    work.write_json("logs/audit.json", found)
    work.write_text("logs/audit.html", page(found))
