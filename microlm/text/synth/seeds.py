"""What fills the templates. Enters: a JSONL file or a count; leaves: objects with places, and drops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from microlm.core.artifact import open_artifact
from microlm.text import sources
from microlm.text.read import Drop
from microlm.text.sources import Source
from microlm.text.synth.recipe import SynthRecipe

Seed = tuple[str, Mapping[str, Any] | Drop]
"""Its place (`file:line`) and its fields, or why it has none."""


def source_of(recipe: SynthRecipe) -> Source | None:
    """The seeds' source, None when they are numbers; what cannot be read is a UserError."""
    if recipe.seeds is None:
        return None
    if recipe.data is not None:
        return sources.parse(f"jsonl:{open_artifact(recipe.data).file(recipe.seeds)}")
    return sources.parse(f"jsonl:{recipe.seeds.removeprefix('jsonl:')}")


def read_seeds(source: Source | None, count: int | None) -> Iterator[Seed]:
    """The objects of a source in order, each fault a Drop; without a source, so many numbers."""
    if source is None:
        for number in range(count or 0):
            yield str(number), {"number": number}
        return
    for block in sources.blocks(source):
        yield from block.objects()
