"""Stage `data`: raw text in, a corpus that can be trusted out.

Enters: the sources named in the recipe. Leaves: documents, conversations, extraction, preferences,
questions and chats, each in its splits, and the audit of it all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from microlm.core.artifact import Workspace, hash_file, stage
from microlm.core.errors import UserError
from microlm.core.recipe import Recipe, StageRecipe, unkeyed
from microlm.text import sources
from microlm.text.audit import Audit, page
from microlm.text.clean import CleanRecipe
from microlm.text.corpus import holdout
from microlm.text.corpus.engine import Engine, load_kernels
from microlm.text.corpus.intake import refine_factbook, refine_sources
from microlm.text.corpus.pool import open_pool
from microlm.text.corpus.refine import Report, Schema
from microlm.text.sources import factbook
from microlm.text.sources.factbook import Factbook, FactbookSizes
from microlm.text.split import SPLITS, Kind, check_shares
from microlm.text.teach import teach_extraction


class DedupRecipe(Recipe):
    """What counts as said before."""

    near: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="documents at least this alike (Jaccard of 5-grams) are one; 0: off",
    )
    line_documents: int = Field(
        default=50, ge=0, description="a line that so many documents hold is taken out; 0: none is"
    )
    memory_mb: int = unkeyed(256, ge=16, description="memory for the search of near duplicates")


class DecontaminateRecipe(Recipe):
    """What training must not have seen: the held-out splits, and these files."""

    benchmarks: list[str] = unkeyed([], description="JSONL files with texts, questions or choices of tests")
    overlap: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of a held-out text's 13-grams that makes a document drop out",
    )


class PrepareRecipe(StageRecipe):
    """From raw sources to cleaned, deduplicated, split and audited records."""

    source: str | list[str] = unkeyed(
        "factbook",
        description="factbook, arithmetic:COUNT, jsonl:PATH, parquet:, csv:, text:, markdown:, hf:NAME, "
        "ms:, or a list; NAME= before it names a task",
    )
    entities: str | None = unkeyed(None, description="entity file that replaces the factbook's own tables")
    strict: bool = Field(
        False, description="stop at the first faulty record instead of dropping and counting it"
    )
    clean: CleanRecipe = Field(CleanRecipe.model_validate({}), description="what is edited, what is dropped")
    dedup: DedupRecipe = Field(DedupRecipe(), description="exact and near duplicates, repeated lines")
    decontaminate: DecontaminateRecipe = Field(
        DecontaminateRecipe(), description="held-out texts inside training documents"
    )
    cut_chars: int = Field(
        0, ge=0, description="longer documents are cut at ends of sentences, in characters; 0: not cut"
    )
    validation_share: float = Field(
        0.02, ge=0, lt=1, description="share of documents, conversations and preferences for validation"
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

    def shares(self) -> dict[Kind, tuple[float, float]]:
        """kind → (validation, test)."""
        return {
            "documents": (self.validation_share, self.test_share),
            "conversations": (self.validation_share, 0.0),
            "extraction": (0.0, self.test_share),
            "preferences": (self.validation_share, 0.0),
        }

    def words(self) -> list[str]:
        """The sources, at least one."""
        words = [self.source] if isinstance(self.source, str) else self.source
        if not words:
            raise UserError("data.source: is an empty list; name at least one source")
        return words


def fingerprint(recipe: PrepareRecipe) -> dict[str, Any]:
    """The bytes that the result depends on: every file of the user, and the factbook's tables if used."""
    words = [sources.parse(word) for word in recipe.words()]
    found: dict[str, Any] = {
        "sources": sorted(([w.kind, w.fingerprint()] for w in words), key=repr),
        "benchmarks": sorted(hash_file(holdout.require(name)) for name in recipe.decontaminate.benchmarks),
    }
    if recipe.entities:
        found["entities"] = hash_file(holdout.require(recipe.entities, "data.entities"))
    if recipe.fill == "factbook" or sources.FACTBOOK in recipe.words():
        found["tables"] = [[p.name, hash_file(p)] for p in factbook.table_files()]
    return found


@stage("data", "data", version=3, fingerprint=fingerprint)
def run(recipe: PrepareRecipe, work: Workspace) -> None:
    """Refine the user's sources and what the factbook fills in → duplicates → held-out → files → audit."""
    check_shares(recipe.validation_share, recipe.test_share)
    audit = Audit()
    with open_pool(recipe.parallel.processes, load_kernels) as pool:
        engine = Engine(work.resume, pool, audit)
        report = refine_sources(engine, recipe.words(), recipe.clean, recipe.strict)
        kinds = kinds_to_fill(recipe, report)
        book = factbook.generate(recipe.seed, recipe.entities, recipe.factbook) if kinds else None
        own = frozenset() if sources.FACTBOOK in recipe.words() else frozenset(report.tasks)
        if book:
            report.add(refine_factbook(engine, book, kinds, own))
        require_records(audit, report.kinds.total())
        engine.drop_exact()
        engine.drop_near(
            recipe.dedup.near, recipe.dedup.memory_mb
        )  # first: versions of a text share its lines
        if engine.drop_shared_lines(recipe.dedup.line_documents, recipe.clean.min_chars):
            engine.drop_exact()  # what is left of two documents can be the same, or nearly so
            engine.drop_near(recipe.dedup.near, recipe.dedup.memory_mb)
        engine.count_kept()
        plan = engine.plan(recipe.shares(), recipe.decontaminate.overlap, recipe.cut_chars)
        benchmarks = list(holdout.benchmark_texts(recipe.decontaminate.benchmarks))
        engine.note_held_out(plan, benchmarks, said_held_out(book, kinds, own))
        leaks = engine.assemble(plan, work.path)
    audit.leakage = {"documents": leaks} | holdout.leakage(work.path)
    require_records(audit, audit.survey.total())
    holdout.write(work, book, kinds, own, audit)
    schema = book.schema if book and "extraction" in kinds else {}
    holdout.complete_extraction(work, merged(report.schema, schema))
    audit.take_taught(teach_extraction(work.path))
    write_audit(work, audit, kinds if book else [])


def kinds_to_fill(recipe: PrepareRecipe, report: Report) -> list[Kind]:
    """The kinds of records that come from the factbook: all if it is a source, else the missing ones."""
    if sources.FACTBOOK in recipe.words():
        return list(SPLITS)
    missing: list[Kind] = [k for k in SPLITS if k == "conversations" or not report.kinds[k]]
    return missing if recipe.fill == "factbook" else []


def require_records(audit: Audit, count: int) -> None:
    """An error when nothing at all is left."""
    if not count:
        dropped = sum((t.dropped for n, t in audit.tallies.items() if n != "read"), Counter[str]())
        reasons = dropped.most_common(3)
        why = ", ".join(f"{reason} {count}" for reason, count in reasons) or "no reason was counted"
        raise UserError(
            f"data.source: nothing is left of {audit.tallies['read'].read} records after cleaning"
            f" ({why}); relax data.clean and data.dedup, or choose another source"
        )


def said_held_out(book: Factbook | None, kinds: list[Kind], own: frozenset[str]) -> Iterator[str]:
    """The composed questions and texts that no training record may repeat word for word."""
    if book and "extraction" in kinds:
        yield from (record.text for record in book.extraction_test)
    if book and "conversations" in kinds and "question" not in own:
        yield from (question.question for question in book.questions_test)


def merged(one: Schema, other: Schema) -> Schema:
    """Both schemas; where they speak of the same relation, the first counts."""
    return {topic: other.get(topic, {}) | one.get(topic, {}) for topic in (other | one)}


def write_audit(work: Workspace, audit: Audit, filled: list[Kind]) -> None:
    """The audit as JSON and as a page; a leak is an error of ours."""
    audit.filled = list(filled)
    audit.check()
    found = audit.to_json()
    work.licences.update(audit.survey.licences)
    work.metrics.update(
        read=audit.tallies["read"].read, written=audit.survey.total(), leakage=sum(audit.leakage.values())
    )
    work.write_json("logs/audit.json", found)
    work.write_text("logs/audit.html", page(found))
