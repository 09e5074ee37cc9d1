"""What is asked, in order. Enters: seeds, templates; leaves: items with messages, or why there are none.

The order and every text follow from the recipe alone, so that the walk can be made again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from microlm.core import runtime
from microlm.core.records import Message
from microlm.text.dedup import DigestSet
from microlm.text.read import Drop, Fault
from microlm.text.synth import prompts
from microlm.text.synth.items import UNREAD, Item, Skipped, request_digest
from microlm.text.synth.recipe import SynthRecipe, Template
from microlm.text.synth.seeds import read_seeds, source_of
from microlm.text.synth.templates import Renderer


class Plan:
    """Seeds × templates × samples. Iterating walks the seeds anew."""

    def __init__(self, recipe: SynthRecipe) -> None:
        self.recipe = recipe
        self._renderer = Renderer(recipe.syntax)
        self._source = source_of(recipe)

    def __iter__(self) -> Iterator[Item | Skipped]:
        asks = self.recipe.prompts
        if asks is None or self._source is None:
            return itertools.islice(self._walk(), self.recipe.limit)
        return _first(prompts.walk(self.recipe, asks, self._source), self.recipe.limit)

    def _walk(self) -> Iterator[Item | Skipped]:
        numbers = itertools.count()
        asked = DigestSet()
        for place, fields in read_seeds(self._source, self.recipe.count):
            if isinstance(fields, Drop):
                yield Skipped(next(numbers), place, UNREAD, fields.reason, fields.detail)
                continue
            for template in self._chosen(place):
                yield from self._items(place, fields, template, asked, numbers)

    def _chosen(self, place: str) -> Sequence[Template]:
        templates = self.recipe.templates
        if self.recipe.each == "all":
            return templates
        return [runtime.rng(self.recipe.seed, "template", place).choice(templates)]

    def _items(
        self,
        place: str,
        fields: Mapping[str, Any],
        template: Template,
        asked: DigestSet,
        numbers: Iterator[int],
    ) -> Iterator[Item | Skipped]:
        name = f"{place}/{template.name}"
        try:
            messages = self.turns(name, fields, template.system, template.prompt)
        except Fault as fault:
            yield Skipped(next(numbers), name, template.name, fault.reason, fault.detail)
            return
        if not asked.add(request_digest(messages, template)):
            detail = messages[-1].content[:60]
            yield Skipped(next(numbers), name, template.name, "duplicate_prompt", detail, messages)
            return
        samples = self.recipe.draw.samples if template.answer is None else 1
        for sample in range(samples):
            yield Item(next(numbers), f"{name}/{sample}" if samples > 1 else name, template, fields, messages)

    def turns(self, name: str, fields: Mapping[str, Any], system: str, prompt: str) -> tuple[Message, ...]:
        """A system message, if there is one, and the user's; raises Fault."""
        said, asked = self.text(name, fields, system), self.text(name, fields, prompt)
        if not asked:
            raise Fault("empty_prompt", "the prompt is empty once its fields are filled in")
        return (*((Message("system", said),) if said else ()), Message("user", asked))

    def text(self, name: str, fields: Mapping[str, Any], template: str) -> str:
        """A template's text for an item; equal names draw equal dice."""
        return self._renderer.render(template, fields, runtime.rng(self.recipe.seed, "synth", name, template))


def _first(found: Iterator[Item | Skipped], limit: int | None) -> Iterator[Item | Skipped]:
    """So many of what is found; those of another task come along and do not count."""
    taken = 0
    while taken != limit and (one := next(found, None)):
        taken += not (isinstance(one, Skipped) and one.reason == prompts.OTHER_TASK)
        yield one
