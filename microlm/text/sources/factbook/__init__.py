"""The embedded default corpus: a small world of true facts and invented entities, composed by seed.

Enters: tables (ours or a user's entity file) and sizes. Leaves: a `Factbook` with all records a run needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from microlm.core import runtime
from microlm.core.recipe import Recipe
from microlm.core.records import Conversation, Document, Extraction, Message, Preference, Question
from microlm.text.sources.factbook import documents, tables, tasks
from microlm.text.sources.factbook.tables import Entity, Tables

__all__ = ["INVENTED", "LICENCE", "REAL", "SOURCE", "Factbook", "FactbookSizes", "generate", "table_files"]

LICENCE = tasks.LICENCE
SOURCE = tasks.SOURCE
REAL, INVENTED = tasks.REAL, tasks.INVENTED
table_files = tables.table_files


class FactbookSizes(Recipe):
    """How many records of each kind the factbook composes."""

    documents: int = Field(14_000, ge=1, description="prose documents for pretraining (dirt comes on top)")
    dirt_share: float = Field(
        0.06, ge=0, le=0.5, description="dirty lines mixed in, as a share of the documents"
    )
    questions: int = Field(22_000, ge=0, description="training conversations that ask for facts")
    extraction: int = Field(
        46_000, ge=0, description="training extraction records, mostly of invented entities"
    )
    reading: int = Field(
        7_000, ge=0, description="training conversations of several turns about a given text"
    )
    chat: int = Field(2_000, ge=0, description="training conversations of small talk")
    preferences: int = Field(1_000, ge=0, description="preference pairs")
    english_share: float = Field(0.07, ge=0, le=1, description="share of English records")
    held_out_entities: float = Field(
        0.15, ge=0.02, le=0.5, description="share of real entities never trained on"
    )
    test_questions: int = Field(300, ge=1, description="held-out questions of each kind of wording")
    test_extraction: int = Field(300, ge=1, description="held-out extraction records of each kind of wording")
    test_chats: int = Field(200, ge=1, description="prompts of the stop check")


@dataclass(frozen=True)
class Factbook:
    """Everything composed, split by entity and wording: no name and wording of a test was trained on."""

    documents: list[Document]
    conversations: list[Conversation]
    extraction_train: list[Extraction]
    extraction_test: list[Extraction]
    questions_train: list[Question]
    questions_test: list[Question]
    chats: list[tuple[Message, ...]]
    preferences: list[Preference]
    schema: dict[str, dict[str, dict[str, str]]]


def generate(seed: int, entities: str | None, sizes: FactbookSizes) -> Factbook:
    """Compose the whole factbook; equal arguments, equal records."""
    book = tables.load(entities)
    known, held_out = split_entities(book, seed, sizes.held_out_entities)
    maker = tasks.Maker(book, known, seed, sizes.english_share)
    docs = documents.compose(maker, sizes.documents, sizes.dirt_share)
    extraction = maker.extraction_train(sizes.extraction)
    conversations = [
        *maker.questions(sizes.questions),
        *(tasks.as_conversation(e) for e in extraction),
        *maker.reading(sizes.reading),
        *maker.small_talk(sizes.chat),
    ]
    test = maker.extraction_test(held_out, sizes.test_extraction)
    return Factbook(
        documents=docs,
        conversations=conversations,
        extraction_train=extraction,
        extraction_test=test,
        questions_train=maker.plain_questions(min(sizes.questions, 8_000)),
        questions_test=maker.questions_test(sizes.test_questions),
        chats=maker.chats(sizes.test_chats, test),
        preferences=maker.preferences(sizes.preferences),
        schema=_schema(book),
    )


def split_entities(book: Tables, seed: int, share: float) -> tuple[list[Entity], list[Entity]]:
    """(known, held out): a name goes to one side in both languages, whatever else the tables hold."""
    zh_names = {e.name for e in book.entities if e.lang == "zh"}
    position = 0
    owner: dict[int, str] = {}
    for i, entity in enumerate(book.entities):  # an English entity follows its Chinese one
        position = i if entity.lang == "zh" else position
        owner[i] = book.entities[position].name
    order = sorted(zh_names, key=lambda n: runtime.derive_seed(seed, "held-out entity", n))
    held = set(order[: max(1, round(share * len(order)))])
    known = [e for i, e in enumerate(book.entities) if owner[i] not in held]
    return known, [e for i, e in enumerate(book.entities) if owner[i] in held]


def _schema(book: Tables) -> dict[str, dict[str, dict[str, str]]]:
    return {
        t.name: {r.name: {"head_type": t.entity_type, "tail_type": r.tail_type} for r in t.relations.values()}
        for t in book.topics.values()
    }
