"""Pretraining prose: known entities told often, invented ones told and restated, dirt mixed in on purpose."""

from __future__ import annotations

import html
import json
from random import Random

from microlm.core.records import Document
from microlm.text.sources.factbook.fiction import Composer
from microlm.text.sources.factbook.tables import Entity
from microlm.text.sources.factbook.tasks import FACT_COUNTS, LICENCE, SOURCE, Maker
from microlm.text.sources.factbook.wording import Writer

KNOWN_SHARE = 0.4


def compose(maker: Maker, count: int, dirt_share: float) -> list[Document]:
    """`count` clean documents and `dirt_share` of dirty lines, in one seeded order."""
    rng = maker.rng("documents")
    writer, composer = Writer(maker.tables, rng), Composer(maker.tables, rng)
    texts = [
        _known(maker, writer, rng) if rng.random() < KNOWN_SHARE else _restated(maker, writer, composer)
        for _ in range(count)
    ]
    dirt = [_dirty(rng.choice(texts), rng) for _ in range(round(count * dirt_share))]
    lines = [*texts, *dirt]
    rng.shuffle(lines)
    return [Document(text, f"{SOURCE}:{i}", LICENCE) for i, text in enumerate(lines, 1)]


def _known(maker: Maker, writer: Writer, rng: Random) -> str:
    """A true entity in prose, its facts in a new order, sometimes with questions and answers about it."""
    entity = rng.choice(maker.known[maker.lang(rng)])
    names = rng.sample(list(entity.facts), len(entity.facts))
    told = Entity(entity.topic, entity.name, {r: entity.facts[r] for r in names}, entity.lang)
    text = writer.paragraph(told, "train")
    return text + "\n" + _asked(told, writer) if rng.random() < 0.3 else text


def _restated(maker: Maker, writer: Writer, composer: Composer) -> str:
    """An invented entity in prose, then as a card, JSON or questions: copying is learnt from such pairs."""
    rng = writer.rng
    lang = maker.lang(rng)
    entity = maker.invented(composer, rng.choice(maker.topics), lang, rng.choice(FACT_COUNTS))
    forms = [_card, _as_json, _as_json, _asked]
    return writer.paragraph(entity, "train") + "\n" + rng.choice(forms)(entity, writer)


def _card(entity: Entity, writer: Writer) -> str:
    colon = "：" if entity.lang == "zh" else ": "
    head = writer.rng.choice(writer.tables.generic[entity.lang]["card_heads"])
    names = writer.rng.sample(list(entity.facts), len(entity.facts))
    rows = [f"{writer.relation_name(entity, r)}{colon}{entity.facts[r]}" for r in names]
    return "\n".join([f"{head}{colon}{entity.name}", *rows])


def _as_json(entity: Entity, writer: Writer) -> str:
    names = writer.rng.sample(list(entity.facts), len(entity.facts))
    facts = {writer.relation_name(entity, r): entity.facts[r] for r in names}
    asked = ("、" if entity.lang == "zh" else ", ").join(facts)
    return f"{asked}\n" + json.dumps({entity.name: facts}, ensure_ascii=False, separators=(",", ":"))


def _asked(entity: Entity, writer: Writer) -> str:
    names = writer.rng.sample(list(entity.facts), min(2, len(entity.facts)))
    return "\n".join(f"{writer.question(entity, r, 'train')}\n{entity.facts[r]}" for r in names)


def _dirty(text: str, rng: Random) -> str:
    """One of the faults that real crawls have; cleaning must repair or drop each."""
    half = len(text) // 2
    faults = [
        text,  # an exact duplicate
        f"<div class='content'><p>{html.escape(text)}</p></div>",
        text[:half] + "\u200b\ufeff" + text[half:] + "\x07",
        text.replace("。", "。 \t  "),
        text[:3],
        (text[:6] + "！") * 40,
        text + "\n上一篇：返回首页 | 版权所有 | 点击关注",
        "\ufffd".join(text),
        "",
    ]
    return rng.choice(faults)
