"""Invented entities: names and values drawn from pools by pattern: nothing to know by heart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

from microlm.text.sources.factbook.tables import Entity, Lang, Relation, Tables, Topic

_POOL = re.compile(r"\{(\w+)\}")
_CONSONANTS, _VOWELS = "bcdfglmnprstv", "aeiou"


@cache
def _gb2312(first: int, last: int) -> str:
    """The Han characters of a range of GB 2312 rows: level 1 (common) or level 2 (rarer)."""
    cells = (
        bytes([row, cell]).decode("gb2312", "ignore")
        for row in range(first, last + 1)
        for cell in range(0xA1, 0xFF)
    )
    return "".join(cells)


class Composer:
    """Draws names, values and whole entities with one random generator."""

    def __init__(self, tables: Tables, rng: Random) -> None:
        self.tables, self.rng = tables, rng
        self.pools: dict[str, Sequence[str]] = tables.fiction["pools"]

    def entity(self, topic: Topic, lang: Lang, facts: int) -> Entity:
        """An invented entity of a topic with that many facts (or all its relations)."""
        names = topic.fiction_names if lang == "zh" else topic.fiction_names_en
        chosen = self.rng.sample(list(topic.relations.values()), min(facts, len(topic.relations)))
        name = self.fill(self.rng.choice(names))
        values = {r.name: self.value(r, lang) for r in chosen}
        return Entity(topic.name, name, {r: v for r, v in values.items() if v != name}, lang, fictional=True)

    def mutant(self, model: Entity, facts: int) -> Entity:
        """An invented entity that looks like a true one: its name and values with a few characters changed.

        Such near misses of what a small model knows by heart force it to read the text instead.
        """
        chosen = self.rng.sample(list(model.facts), min(facts, len(model.facts)))
        name = self._changed(model.name)
        values = {
            r: self._changed(model.facts[r]) if self.rng.random() < 0.7 else model.facts[r] for r in chosen
        }
        return Entity(
            model.topic, name, {r: v for r, v in values.items() if v != name}, model.lang, fictional=True
        )

    def _changed(self, text: str) -> str:
        """The text with one or two characters replaced, one dropped, or one added; digits stay digits."""
        chars = list(text)
        for _ in range(self.rng.choice((1, 1, 2))):
            at = self.rng.randrange(len(chars))
            if chars[at].isdigit():
                chars[at] = str(self.rng.randint(1, 9))
            elif "\u4e00" <= chars[at] <= "\u9fff":
                new = self._draw(self.rng.choice(("HAN", "PLACE", "MISC", "GIVEN", "FOREIGN")))
                dice = self.rng.random()
                chars[at] = new if dice < 0.7 else chars[at] + new if dice < 0.85 or len(chars) < 3 else ""
            chars = list("".join(chars))
        return "".join(chars)

    def value(self, relation: Relation, lang: Lang) -> str:
        """An invented value of a relation."""
        spec: dict[str, Any] = relation.fiction
        suffix = "" if lang == "zh" else "_en"
        if spec["kind"] == "number":
            number = self.rng.randint(spec["low"], spec["high"])
            return f"{spec.get('prefix', '') if lang == 'zh' else ''}{number}{spec['unit' + suffix]}"
        if spec["kind"] == "choice":
            return str(self.rng.choice(spec["values" + suffix]))
        patterns = spec["patterns" + suffix] if spec["kind"] == "pattern" else None
        return self.fill(self.rng.choice(patterns or self.tables.fiction["kinds" + suffix][spec["kind"]]))

    def fill(self, pattern: str) -> str:
        """A pattern with every {POOL} replaced by a draw."""
        return _POOL.sub(lambda m: self._draw(m[1]), pattern)

    def _draw(self, pool: str) -> str:
        r = self.rng
        if pool in self.pools:
            return str(r.choice(self.pools[pool]))
        if pool == "HAN":
            return r.choice(_gb2312(0xB0, 0xD7))
        if pool == "RARE":
            return r.choice(_gb2312(0xD8, 0xF7))
        if pool == "DIGIT":
            return str(r.randint(0, 9))
        if pool == "NUM":
            return str(r.randint(1, 999))
        if pool in ("LATIN", "EN_NAME", "EN_PLACE"):
            syllables = "".join(r.choice(_CONSONANTS) + r.choice(_VOWELS) for _ in range(r.randint(2, 3)))
            ending = {
                "LATIN": ["", "us", "is"],
                "EN_NAME": ["", "n", "ck"],
                "EN_PLACE": ["ton", "ford", "by"],
            }[pool]
            return (syllables + r.choice(ending)).capitalize()
        raise ValueError(f"unknown pool {pool}")
