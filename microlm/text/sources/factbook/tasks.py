"""Entities → questions, extraction records, reading conversations, chats and preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from microlm.core import runtime
from microlm.core.records import Conversation, Extraction, Message, Preference, Question, Triple
from microlm.text import extraction as form
from microlm.text.sources.factbook.fiction import Composer
from microlm.text.sources.factbook.tables import Entity, Lang, Tables, Topic
from microlm.text.sources.factbook.wording import Kind, Writer, relation_name

SOURCE, LICENCE = "factbook", "Apache-2.0"
REAL, INVENTED, BOTH = (f"{SOURCE}:{origin}" for origin in ("real", "invented", "real and invented"))
"""Sources of held-out extraction records, by the entities that their texts are about."""
FACT_COUNTS = (1, 1, 2, 2, 3, 3, 4)
"""How many facts of an entity one text tells, drawn evenly from these."""
MUTANT_SHARE = 0.5
DRAWS_IN_VAIN = 2_000


def turns(*contents: str) -> tuple[Message, ...]:
    """User and assistant by turns, the user first."""
    return tuple(Message("assistant" if i % 2 else "user", c) for i, c in enumerate(contents))


def conversation(task: str, *contents: str) -> Conversation:
    """A factbook conversation."""
    return Conversation(turns(*contents), task, SOURCE, LICENCE)


def as_conversation(record: Extraction) -> Conversation:
    """An extraction record as a chat of one turn."""
    asked = form.prompt(record.text, record.allowed, record.lang)
    return conversation("extraction", asked, form.answer(record.relation, record.allowed))


class Maker:
    """Makes records about the known entities and about invented ones; remembers every name it trained on."""

    def __init__(self, tables: Tables, known: list[Entity], seed: int, english_share: float) -> None:
        self.tables, self.seed, self.english_share = tables, seed, english_share
        self.known: dict[Lang, list[Entity]] = {"zh": [], "en": []}
        self._index: dict[tuple[Lang, str], list[Entity]] = {}
        for entity in known:
            self.known[entity.lang].append(entity)
            self._index.setdefault((entity.lang, entity.topic), []).append(entity)
        self.topics: list[Topic] = list(tables.topics.values())
        self.real_names = {e.name for e in tables.entities}
        self.trained_names: set[str] = {n for e in known for n in (e.name, *e.facts.values())}

    def rng(self, purpose: str) -> Random:
        """A random generator of its own for each kind of record."""
        return runtime.rng(self.seed, "factbook", purpose)

    def lang(self, rng: Random) -> Lang:
        """Chinese first, English by its share."""
        return "en" if self.known["en"] and rng.random() < self.english_share else "zh"

    def invented(self, composer: Composer, topic: Topic, lang: Lang, facts: int) -> Entity:
        """An invented entity, remembered as trained on: by patterns, or (zh) a near miss of a known one."""
        known = [e for e in self._by_topic(lang, topic) if len(e.facts) >= facts] if lang == "zh" else []
        entity = Entity(topic.name, "", {})
        while (
            not entity.facts or entity.name in self.real_names
        ):  # neither nothing nor lies about true things
            if known and composer.rng.random() < MUTANT_SHARE:
                entity = composer.mutant(composer.rng.choice(known), facts)
            else:
                entity = composer.entity(topic, lang, facts)
        self.trained_names.update((entity.name, *entity.facts.values()))
        return entity

    def questions(self, count: int) -> list[Conversation]:
        """Facts of known entities, asked in training wordings."""
        rng = self.rng("questions")
        writer = Writer(self.tables, rng)
        made = []
        for _ in range(count):
            entity = rng.choice(self.known[self.lang(rng)])
            relation = rng.choice(list(entity.facts))
            made.append(
                conversation("question", writer.question(entity, relation, "train"), entity.facts[relation])
            )
        return made

    def plain_questions(self, count: int) -> list[Question]:
        """Training questions without slips: what the baselines may learn from."""
        rng = self.rng("plain questions")
        writer = Writer(self.tables, rng, slips=False)
        return [self._question(rng, writer, "train", i, self.lang(rng)) for i in range(count)]

    def questions_test(self, count: int) -> list[Question]:
        """Facts of known entities, asked in held-out wordings; `count` of each kind, or as many as there are.

        None is asked twice. There are no more when `DRAWS_IN_VAIN` draws have given nothing new.
        """
        rng = self.rng("test questions")
        writer = Writer(self.tables, rng)
        kinds: tuple[Kind, ...] = ("specific", "generic")
        made: dict[str, Question] = {}  # by text
        for kind in kinds:
            first, in_vain = len(made), 0
            while len(made) < first + count and in_vain < DRAWS_IN_VAIN:
                question = self._question(rng, writer, kind, len(made) - first, self.lang(rng))
                in_vain = in_vain + 1 if question.question in made else 0
                made.setdefault(question.question, question)
        return list(made.values())

    def _question(self, rng: Random, writer: Writer, kind: Kind, number: int, lang: Lang) -> Question:
        entity = rng.choice(self.known[lang])
        relation = rng.choice(list(entity.facts))
        text = writer.question(entity, relation, kind)
        name = f"q-{kind}-{number:05d}"
        return Question(name, text, entity.facts[relation], kind, lang, entity.name)

    def extraction_train(self, count: int) -> list[Extraction]:
        """Training records, all of invented entities: a fact known by heart would teach not to read."""
        rng = self.rng("extraction")
        writer, composer = Writer(self.tables, rng), Composer(self.tables, rng)

        def pick(topic: Topic, lang: Lang, facts: int) -> Entity:
            return self.invented(composer, topic, lang, facts)

        return [self._record(rng, writer, "train", i, pick) for i in range(count)]

    def extraction_test(self, held_out: Sequence[Entity], count: int) -> list[Extraction]:
        """Test records of each kind of wording; no head was a name or value in training. Call it last."""
        rng = self.rng("test extraction")
        writer, composer = Writer(self.tables, rng), Composer(self.tables, rng)
        pool = {(e.topic, e.lang, e.name): e for e in held_out if e.name not in self.trained_names}

        def pick(topic: Topic, lang: Lang, facts: int) -> Entity:
            real = [e for (t, language, _), e in pool.items() if t == topic.name and language == lang]
            if real and rng.random() < 0.4:
                return _some_facts(rng.choice(real), facts, rng)
            while True:
                entity = composer.entity(topic, lang, facts)
                if (
                    entity.facts
                    and entity.name not in self.trained_names
                    and entity.name not in self.real_names
                ):
                    return entity

        kinds: tuple[Kind, ...] = ("mixed", "specific", "generic")
        made: dict[str, Extraction] = {}  # by text: none is asked twice
        for kind in kinds:
            goal = len(made) + count
            while len(made) < goal:
                record = self._record(rng, writer, kind, len(made) + count - goal, pick)
                made.setdefault(record.text, record)
        return list(made.values())

    def _record(
        self, rng: Random, writer: Writer, kind: Kind, number: int, pick: Callable[[Topic, Lang, int], Entity]
    ) -> Extraction:
        topic, lang = rng.choice(self.topics), self.lang(rng)
        pair = rng.random() < 0.15
        counts = [rng.randint(1, 2), rng.randint(1, 2)] if pair else [rng.choice(FACT_COUNTS)]
        entities = [pick(topic, lang, n) for n in counts]
        if pair and entities[0].name == entities[1].name:
            entities.pop()
        text = ("" if lang == "zh" else " ").join(writer.paragraph(e, kind) for e in entities)
        allowed = self._allowed(rng, topic, entities)
        triples = [
            Triple(
                e.name,
                relation_name(self.tables, e.topic, r, lang),
                v,
                topic.entity_type,
                topic.relations[r].tail_type,
            )
            for e in entities
            for r, v in e.facts.items()
            if r in allowed
        ]
        names = tuple(self._name(r, topic, lang) for r in allowed)
        record_id, source = f"x-{kind}-{number:05d}", SOURCE if kind == "train" else _origin(entities)
        return Extraction(record_id, topic.name, text, tuple(triples), names, kind, lang, source, LICENCE)

    def _allowed(self, rng: Random, topic: Topic, entities: Sequence[Entity]) -> list[str]:
        """The relations asked for: the stated ones (at times one less), some unstated, one from elsewhere."""
        stated = {r for e in entities for r in e.facts}
        allowed = [r for r in topic.relations if r in stated or rng.random() < 0.25]
        if rng.random() < 0.3:
            other = rng.choice(list(rng.choice(self.topics).relations))
            own = {self._name(r, topic, entities[0].lang) for r in topic.relations}
            allowed += [other] if self._name(other, topic, entities[0].lang) not in own else []
        rng.shuffle(allowed)
        asked = [r for r in allowed if r in stated]
        if len(asked) > 1 and rng.random() < 0.15:
            allowed.remove(rng.choice(asked))
        return allowed

    def _name(self, relation: str, topic: Topic, lang: Lang) -> str:
        owner = (
            topic if relation in topic.relations else next(t for t in self.topics if relation in t.relations)
        )
        return relation_name(self.tables, owner.name, relation, lang)

    def _by_topic(self, lang: Lang, topic: Topic) -> list[Entity]:
        return self._index.get((lang, topic.name), [])

    def reading(self, count: int) -> list[Conversation]:
        """A text, then questions about it over several turns."""
        rng = self.rng("reading")
        writer, composer = Writer(self.tables, rng), Composer(self.tables, rng)
        made = []
        for _ in range(count):
            lang = self.lang(rng)
            entity = self.invented(composer, rng.choice(self.topics), lang, rng.randint(2, 4))
            asked = rng.sample(list(entity.facts), len(entity.facts))
            head = "文本：" if lang == "zh" else "Text: "
            contents: list[str] = []
            for i, relation in enumerate(asked):
                question = writer.question(entity, relation, "train")
                before = f"{head}{writer.paragraph(entity, 'train')}\n" if i == 0 else ""
                contents += [before + question, entity.facts[relation]]
            made.append(conversation("reading", *contents))
        return made

    def small_talk(self, count: int) -> list[Conversation]:
        """Greetings and facts over several turns."""
        rng = self.rng("small talk")
        writer = Writer(self.tables, rng)
        pairs: list[list[str]] = self.tables.generic["chat"]
        made = []
        for _ in range(count):
            contents: list[str] = [*rng.choice(pairs)] if rng.random() < 0.7 else []
            for _ in range(rng.randint(0 if contents else 2, 3)):
                entity = rng.choice(self.known[self.lang(rng)])
                relation = rng.choice(list(entity.facts))
                contents += [writer.question(entity, relation, "train"), entity.facts[relation]]
            made.append(conversation("chat", *contents))
        return made

    def chats(self, count: int, test: Sequence[Extraction]) -> list[tuple[Message, ...]]:
        """Prompts of every kind, in held-out wordings, for the check that answers end."""
        rng = self.rng("chats")
        writer = Writer(self.tables, rng)
        talk: list[str] = self.tables.generic["chat_held_out"]
        made: list[tuple[Message, ...]] = []
        for i in range(count):
            entity = rng.choice(self.known[self.lang(rng)])
            relations = rng.choices(list(entity.facts), k=2)
            first, second = (writer.question(entity, r, "mixed") for r in relations)
            record = rng.choice(test)
            asked = form.prompt(record.text, record.allowed, record.lang)
            options = [
                (first,),
                (first, entity.facts[relations[0]], second),
                (rng.choice(talk),),
                (asked,),
                (first,),
            ]
            made.append(turns(*options[i % len(options)]))
        return made

    def preferences(self, count: int) -> list[Preference]:
        """The right value against the value of another entity."""
        rng = self.rng("preferences")
        writer = Writer(self.tables, rng)
        made: list[Preference] = []
        while len(made) < count:
            entity = rng.choice(self.known[self.lang(rng)])
            relation = rng.choice(list(entity.facts))
            right = entity.facts[relation]
            others = {
                e.facts.get(relation, right)
                for e in self._by_topic(entity.lang, self.tables.topics[entity.topic])
            }
            wrong = rng.choice(sorted(others - {right}) or ["不知道"])
            question = writer.question(entity, relation, "train")
            made.append(Preference(turns(question), right, wrong, SOURCE, LICENCE, task="question"))
        return made


def _origin(entities: Sequence[Entity]) -> str:
    """Whether a text is about real entities, invented ones, or one of each."""
    fictional = {e.fictional for e in entities}
    return BOTH if len(fictional) == 2 else INVENTED if True in fictional else REAL


def _some_facts(entity: Entity, count: int, rng: Random) -> Entity:
    """The entity with at most `count` of its facts, in random order."""
    chosen = rng.sample(list(entity.facts), min(count, len(entity.facts)))
    return Entity(
        entity.topic, entity.name, {r: entity.facts[r] for r in chosen}, entity.lang, entity.fictional
    )
