"""The factbook's tables: topics with wordings, entities with facts. Data files in, frozen records out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from microlm.core.errors import UserError
from microlm.core.recipe import nearest

HERE = Path(__file__).parent
Lang = Literal["zh", "en"]
LANGS: tuple[Lang, ...] = ("zh", "en")


@dataclass(frozen=True)
class Wordings:
    """Ways to say a relation: statements hold {e} and {v} (generic ones {r}), questions {e}."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    statements_held_out: tuple[str, ...]
    questions_held_out: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """One relation of a topic. `fiction` says how an invented value looks."""

    name: str
    name_en: str
    tail_type: str
    fiction: dict[str, Any]
    zh: Wordings
    en: Wordings


@dataclass(frozen=True)
class Topic:
    """One of the 12 InstructIE topics."""

    name: str
    noun: str
    pronouns: tuple[str, ...]
    entity_type: str
    fiction_names: tuple[str, ...]
    fiction_names_en: tuple[str, ...]
    relations: dict[str, Relation]


@dataclass(frozen=True)
class Entity:
    """A named thing and its facts: relation name → value, in one language."""

    topic: str
    name: str
    facts: dict[str, str]
    lang: Lang = "zh"
    fictional: bool = False


@dataclass(frozen=True)
class Tables:
    """Everything the composer reads."""

    topics: dict[str, Topic]
    entities: tuple[Entity, ...]
    generic: dict[str, Any]
    fiction: dict[str, Any]
    heads_en: dict[str, str] = field(default_factory=dict)


def table_files() -> list[Path]:
    """The data files, in a fixed order (their bytes are part of a data artifact's key)."""
    return sorted([*HERE.glob("*.json"), *HERE.glob("topics/*.json"), *HERE.glob("entities/*.jsonl")])


@cache
def _topics() -> dict[str, Topic]:
    topics = [_topic(json.loads(p.read_text(encoding="utf-8"))) for p in sorted(HERE.glob("topics/*.json"))]
    return {t.name: t for t in topics}


def load(entities_file: str | None = None) -> Tables:
    """The tables, with the entities of `entities_file` in place of ours when one is given."""
    topics = _topics()
    files = [Path(entities_file)] if entities_file else sorted(HERE.glob("entities/*.jsonl"))
    entities = tuple(e for f in files for e in _read_entities(f, topics))
    generic = json.loads((HERE / "generic.json").read_text(encoding="utf-8"))
    fiction = json.loads((HERE / "fiction.json").read_text(encoding="utf-8"))
    return Tables(topics, entities, generic, fiction)


def _topic(data: dict[str, Any]) -> Topic:
    relations = {r["name"]: _relation(r) for r in data["relations"]}
    return Topic(
        name=data["topic"],
        noun=data["noun"],
        pronouns=tuple(data["pronouns"]),
        entity_type=data["entity_type"],
        fiction_names=tuple(data["fiction_names"]),
        fiction_names_en=tuple(data["fiction_names_en"]),
        relations=relations,
    )


def _relation(data: dict[str, Any]) -> Relation:
    def wordings(suffix: str) -> Wordings:
        return Wordings(
            tuple(data[f"statements{suffix}"]),
            tuple(data[f"questions{suffix}"]),
            tuple(data[f"statements{suffix}_held_out"]),
            tuple(data[f"questions{suffix}_held_out"]),
        )

    return Relation(
        data["name"], data["name_en"], data["tail_type"], data["fiction"], zh=wordings(""), en=wordings("_en")
    )


def _read_entities(path: Path, topics: dict[str, Topic]) -> list[Entity]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such entity file; expected JSONL like the tables in text/sources/factbook/entities"
        ) from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: byte {e.start} is not UTF-8; save the entity file as UTF-8") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    entities: list[Entity] = []
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            for entity in _entity(line, f"{path}:{number}", topics):
                if (entity.lang, entity.name) in seen:
                    raise UserError(
                        f"{path}:{number}: '{entity.name}' stands twice; keep one line for each entity"
                    )
                seen.add((entity.lang, entity.name))
                entities.append(entity)
    if not entities:
        raise UserError(f"{path}: holds no entities; expected one JSON object a line")
    if sum(e.lang == "zh" for e in entities) < 2:
        raise UserError(f"{path}: holds one entity; give two at least, as one is held out for the test")
    return entities


def _entity(line: str, where: str, topics: dict[str, Topic]) -> list[Entity]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not a JSON object; expected {{'topic', 'name', 'facts'}}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    topic = topics.get(str(row.get("topic")))
    if topic is None:
        raise UserError(
            f"{where}: unknown topic {row.get('topic')!r}; {nearest(str(row.get('topic')), topics)}"
        )
    found = [Entity(topic.name, _name(row, where), _facts(row, topic.relations, where))]
    if english := row.get("en"):
        if not isinstance(english, dict):
            raise UserError(f"{where}: key 'en' must be an object with name and facts; found {english!r}")
        known = {r.name_en: r.name for r in topic.relations.values()}
        facts = {known[k]: v for k, v in _facts(english, known, where).items()}
        found.append(Entity(topic.name, _name(english, where), facts, "en"))
    return found


def _name(row: dict[str, Any], where: str) -> str:
    name = row.get("name")
    if not _is_text(name):
        raise UserError(f"{where}: key 'name' must be one line of text; found {name!r}")
    return str(name).strip()


def _is_text(value: Any) -> bool:
    """Whether a value fits into a sentence: no line breaks, control characters or lone surrogates."""
    return isinstance(value, str) and bool(value.strip()) and value.strip().isprintable()


def _facts(row: dict[str, Any], known: dict[str, Any], where: str) -> dict[str, str]:
    facts = row.get("facts")
    if not isinstance(facts, dict) or not facts:
        raise UserError(f"{where}: key 'facts' must map relations to values; found {facts!r}")
    for relation, value in facts.items():
        if relation not in known:
            raise UserError(f"{where}: unknown relation '{relation}'; {nearest(relation, known)}")
        if not _is_text(value):
            raise UserError(f"{where}: the value of '{relation}' must be one line of text; found {value!r}")
    return {r: v.strip() for r, v in facts.items()}
