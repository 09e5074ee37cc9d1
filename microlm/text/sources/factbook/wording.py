"""Facts → sentences, questions, paragraphs, with wordings of the training half or of the held-out half."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from microlm.text.sources.factbook.tables import Entity, Lang, Tables

Kind = Literal["train", "specific", "generic", "mixed"]
_PART = re.compile(r"(\{[erv]\})")
_FILLERS = "的是在了有为于这那一个人会也都就被把给从和与之其所以对此"
SLIP_SHARE = 0.35
"""Share of training wordings that get random slips: without them a small model learns wordings by heart."""
CROSS_SHARE = 0.4
"""Share of training wordings crossed with another wording of the same relation, for the same reason."""


@dataclass
class Writer:
    """Words facts. `slips` turns on random slips in training wordings."""

    tables: Tables
    rng: Random
    slips: bool = True

    def statement(self, entity: Entity, relation: str, subject: str, kind: Kind) -> str:
        """One sentence (no final stop) saying that `subject` has the fact."""
        template = self._pick(entity, relation, "statements", kind, specific_share=0.6)
        return self._fill(template, entity, relation, subject)

    def question(self, entity: Entity, relation: str, kind: Kind) -> str:
        """One question whose answer is the fact's value."""
        template = self._pick(entity, relation, "questions", kind, specific_share=0.65)
        return self._fill(template, entity, relation, entity.name)

    def paragraph(self, entity: Entity, kind: Kind) -> str:
        """All facts of an entity in their order; later sentences may use a pronoun or the topic's noun."""
        words = self.tables.generic[entity.lang]
        openers = words["openers"] if kind == "train" else words["openers_held_out"]
        tails = words["tails"] if kind == "train" else []
        stop, comma = ("。", "，") if entity.lang == "zh" else (". ", "; ")
        out: list[str] = []
        facts = list(entity.facts)
        for i, relation in enumerate(facts):
            subject = entity.name if i == 0 else self._subject(entity)
            opener = self.rng.choice(openers) if openers and self.rng.random() < 0.35 else ""
            tail = self.rng.choice(tails) if tails and self.rng.random() < 0.15 else ""
            sentence = self.statement(entity, relation, subject, kind)
            names = (subject, entity.facts[relation])  # they stay as the gold answer spells them
            starts = not opener and (not out or out[-1] == stop) and not sentence.startswith(names)
            if entity.lang == "en" and starts:
                sentence = sentence[:1].upper() + sentence[1:]
            last = i == len(facts) - 1
            out += [opener + sentence + tail, stop if last or self.rng.random() < 0.6 else comma]
        return "".join(out).strip()

    def relation_name(self, entity: Entity, relation: str) -> str:
        """The relation's name in the entity's language."""
        return relation_name(self.tables, entity.topic, relation, entity.lang)

    def _subject(self, entity: Entity) -> str:
        if entity.lang == "en" or self.rng.random() < 0.4:
            return entity.name
        topic = self.tables.topics[entity.topic]
        return self.rng.choice(topic.pronouns) if self.rng.random() < 0.65 else "该" + topic.noun

    def _pick(self, entity: Entity, relation: str, form: str, kind: Kind, specific_share: float) -> str:
        own = getattr(self.tables.topics[entity.topic].relations[relation], entity.lang)
        generic = self.tables.generic[entity.lang]
        if kind == "train":
            pool = getattr(own, form) if self.rng.random() < specific_share else generic[form]
            return self._varied(self.rng.choice(pool), pool, entity.lang)
        specific = kind == "specific" or (kind == "mixed" and self.rng.random() < 0.6)
        return self.rng.choice(getattr(own, form + "_held_out") if specific else generic[form + "_held_out"])

    def _fill(self, template: str, entity: Entity, relation: str, subject: str) -> str:
        values = {"{e}": subject, "{v}": entity.facts[relation], "{r}": self.relation_name(entity, relation)}
        return "".join(values.get(p, p) for p in _PART.split(template))

    def _varied(self, template: str, pool: Sequence[str], lang: Lang) -> str:
        """A training wording, now and then crossed with others of its pool, now and then with slips."""
        if not self.slips:
            return template
        if self.rng.random() < CROSS_SHARE:
            template = self._crossed(template, pool)
        return self._slip(template) if lang == "zh" and self.rng.random() < SLIP_SHARE else template

    def _crossed(self, template: str, pool: Sequence[str]) -> str:
        """The template with its words around the braces taken from templates of the same form."""
        parts = _PART.split(template)
        mates = [m for m in (_PART.split(t) for t in pool) if m[1::2] == parts[1::2]]
        words = [self.rng.choice(mates)[i] if i % 2 == 0 else part for i, part in enumerate(parts)]
        return "".join(words)

    def _slip(self, template: str) -> str:
        """Drop, replace or add a few characters outside the braces."""
        parts = _PART.split(template)
        for i in range(0, len(parts), 2):
            out = ""
            for char in parts[i]:
                dice = self.rng.random()
                if dice < 0.12:
                    continue
                out += self.rng.choice(_FILLERS) if dice < 0.18 and not char.isascii() else char
                if dice > 0.92 and not char.isascii():
                    out += self.rng.choice(_FILLERS)
            parts[i] = out
        return "".join(parts)


def relation_name(tables: Tables, topic: str, relation: str, lang: Lang) -> str:
    """The relation's name in a language."""
    return relation if lang == "zh" else tables.topics[topic].relations[relation].name_en
