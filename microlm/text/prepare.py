"""Stage `data`: raw text in, a corpus that can be trusted out (documents, conversations, extraction, questions, …).

Enters: the sources named in the recipe. Leaves: the data artifact (see docs/architecture.md) and its audit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal, Self

from pydantic import Field

from microlm.core import storage
from microlm.core.artifact import Workspace, hash_file, stage
from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.core.recipe import StageRecipe, unkeyed
from microlm.core.records import Conversation, Document, Extraction, Preference, to_json
from microlm.text import audit as auditing
from microlm.text import clean as cleaning
from microlm.text import sources
from microlm.text.audit import Audit
from microlm.text.dedup import DigestSet, digest, record_digest
from microlm.text.read import Record, read_records
from microlm.text.sources import factbook
from microlm.text.sources.factbook import Factbook, FactbookSizes
from microlm.text.split import Split, check_shares, leakage, move_one, split_of

Kind = Literal["documents", "conversations", "extraction", "preferences"]
Types = type[Document] | type[Conversation] | type[Extraction] | type[Preference]
TYPES: Mapping[Kind, Types] = {
    "documents": Document,
    "conversations": Conversation,
    "extraction": Extraction,
    "preferences": Preference,
}
SPLITS: Mapping[Kind, tuple[Split, ...]] = {
    "documents": ("train", "validation", "test"),
    "conversations": ("train", "validation"),
    "extraction": ("train", "test"),
    "preferences": ("train",),
}
MAX_CHATS = 200


class PrepareRecipe(StageRecipe):
    """From raw sources to cleaned, deduplicated, split and audited records."""

    source: str | list[str] = unkeyed(
        "factbook", description="factbook, jsonl:PATH, text:PATH|FOLDER, hf:NAME[:split], ms:NAME[:split], or a list"
    )
    entities: str | None = unkeyed(None, description="entity file that replaces the factbook's own tables")
    strict: bool = Field(False, description="stop at the first faulty record instead of dropping and counting it")
    min_chars: int = Field(12, ge=0, description="shorter documents are dropped, in characters after cleaning")
    max_chars: int = Field(1_000_000, ge=1, description="longer documents are dropped, in characters")
    validation_share: float = Field(0.02, ge=0, lt=1, description="share of documents and conversations for validation")
    test_share: float = Field(0.02, ge=0, lt=1, description="share of documents and of a user's extraction for the test")
    fill: Literal["factbook", "none"] = Field(
        "factbook", description="where the kinds of records come from that the sources do not hold"
    )
    factbook: FactbookSizes = Field(FactbookSizes(), description="how many records the factbook composes")


def fingerprint(recipe: PrepareRecipe) -> dict[str, Any]:
    """The bytes that the result depends on: every file of the user, and the factbook's tables when they are used."""
    words = [sources.parse(word) for word in _words(recipe)]
    found: dict[str, Any] = {"sources": [[w.kind, w.split, w.fingerprint()] for w in words]}
    if recipe.entities:
        found["entities"] = hash_file(_entity_file(recipe.entities))
    if recipe.fill == "factbook" or sources.FACTBOOK in _words(recipe):
        found["tables"] = [[p.name, hash_file(p)] for p in factbook.table_files()]
    return found


@stage("data", "data", version=1, fingerprint=fingerprint)
def run(recipe: PrepareRecipe, work: Workspace) -> None:
    """Read → clean → dedup → split → write, first the user's sources, then what the factbook fills in → audit."""
    check_shares(recipe.validation_share, recipe.test_share)
    audit = Audit()
    with Shelves(work.path, audit) as shelves:
        intake = Intake(recipe, audit, shelves)
        intake.take(_read_sources(recipe, audit))
        kinds = _kinds_to_fill(recipe, audit)
        book = factbook.generate(recipe.seed, recipe.entities, recipe.factbook) if kinds else None
        if book:
            intake.take(_read_factbook(book, kinds, audit), is_split=True)
    _require_documents(audit)
    _write_held_out(work, book, kinds, audit)
    _write_schema(work, book, audit)
    _ensure_held_out(recipe, work, audit)
    _decontaminate(work, audit)
    _check_leakage(work, audit)
    _write_audit(work, audit)
