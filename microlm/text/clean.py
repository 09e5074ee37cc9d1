"""Cleaning as pure functions `Document → (Document, reason | None)`: an edited text, or why to drop it.

`clean` runs the rules in order and counts, for each, what it changed or dropped, with examples.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from microlm.core.recipe import Recipe
from microlm.core.records import (
    Conversation,
    Document,
    Extraction,
    Message,
    Preference,
    ToolCall,
    Triple,
)
from microlm.text.read import Record, texts_of
from microlm.text.rules import Rule, encoding, filters, language, lines, markup, privacy
from microlm.text.rules.encoding import normalised as normalised
from microlm.text.rules.encoding import visible as visible

MAX_EXAMPLES = 3
GLIMPSE_CHARS = 200


class CleanRecipe(Recipe):
    """What cleaning edits and drops, besides what no text should hold."""

    min_chars: int = Field(
        12, ge=0, description="shorter documents are dropped, in characters after cleaning"
    )
    max_chars: int = Field(1_000_000, ge=1, description="longest document, in characters before cleaning")
    too_long: Literal["drop", "cut"] = Field(
        "drop", description="what becomes of longer documents; cut keeps their beginning, to a sentence's end"
    )
    max_line_chars: int = Field(
        20_000, ge=100, description="longer lines are broken where a sentence ends, in characters"
    )
    max_word_chars: int = Field(
        2_000, ge=100, description="longer runs of ASCII without a space are removed, in characters"
    )
    replace: dict[Annotated[str, Field(min_length=1)], str] = Field(
        {}, description="literal replacements: {from: to}"
    )
    languages: list[Annotated[str, Field(pattern="^[a-z]{2,3}$")]] = Field(
        [],
        description="ISO 639-1 codes of the languages kept, for example [zh, en]; all if empty",
    )
    simplify: bool = Field(False, description="traditional Chinese characters become simplified")
    mask_pii: bool = Field(
        False,
        description="placeholders for numbers of identity, phone, card and account, e-mail and IP addresses",
    )
    drop_ads: bool = Field(True, description="drop documents that are little but advertising")
    max_repeated: float = Field(
        0.85,
        gt=0,
        le=1,
        description="largest share of a document in runs of 10 words that stood there before",
    )
    max_top_run: float = Field(
        0.6, gt=0, le=1, description="largest share of a document in its most frequent run of 4 words"
    )
    min_letters: float = Field(0.3, ge=0, lt=1, description="smallest share of letters in what is seen")
    max_symbols: float = Field(0.1, gt=0, description="most # and … for each word")
    max_bullets: float = Field(
        0.95, gt=0, le=1, description="largest share of lines that begin with a bullet"
    )
    max_ellipses: float = Field(0.5, gt=0, le=1, description="largest share of lines that break off with …")


@dataclass
class Effects:
    """What the rules did to a corpus: documents changed by each rule, with the place of the first few."""

    changed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, rule: str, before: Document, after: Document) -> None:
        """Count one document that `rule` edited, and keep a glimpse of the first few."""
        self.changed[rule] += 1
        shown = self.examples.setdefault(rule, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(f"{before.source}: {_difference(before.text, after.text)}")

    def add(self, other: Effects) -> None:
        """Put the effects on another part of the corpus, which comes behind this one, to these."""
        self.changed += other.changed
        for rule, examples in other.examples.items():
            self.examples[rule] = (self.examples.get(rule, []) + examples)[:MAX_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        """The effects as plain values, the most frequent rule first."""
        return {
            rule: {"documents": count, "examples": self.examples.get(rule, [])}
            for rule, count in self.changed.most_common()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Effects:
        """What `to_json` gave."""
        counts = Counter({rule: found["documents"] for rule, found in data.items()})
        return cls(counts, {rule: list(found["examples"]) for rule, found in data.items()})


def rules(recipe: CleanRecipe) -> dict[str, Rule]:
    """The rules by name, in the order in which they run."""
    long = filters.drop_long if recipe.too_long == "drop" else filters.cut_long
    return {
        "too_long": partial(long, max_chars=recipe.max_chars),
        "mojibake": encoding.repair_mojibake,
        "broken_encoding": encoding.drop_broken,
        "control_characters": encoding.remove_control,
        "front_matter": markup.remove_front_matter,
        "html": markup.html_to_text,
        "encoded_data": partial(lines.remove_data, max_chars=recipe.max_word_chars),
        "fullwidth_ascii": encoding.fold_fullwidth,
        "link_lines": lines.remove_links,
        "boilerplate_lines": lines.remove_boilerplate,
        "whitespace": lines.normalise_whitespace,
        "unicode_nfc": encoding.normalise_unicode,
        "spaced_out": lines.join_spaced,
        **({"simplified": language.simplify} if recipe.simplify else {}),
        **(_replacements(recipe.replace) if recipe.replace else {}),
        **(privacy.rules() if recipe.mask_pii else {}),
        "long_lines": partial(lines.break_lines, max_chars=recipe.max_line_chars),
        **_filters(recipe),
    }


def _replacements(pairs: dict[str, str]) -> dict[str, Rule]:
    return {"replacements": partial(lines.put_in_place, pattern=lines.any_of(pairs), pairs=pairs)}


def _filters(recipe: CleanRecipe) -> dict[str, Rule]:
    """The rules that look at the edited text as a whole."""
    kept = frozenset(recipe.languages)
    shares = {
        name: getattr(recipe, name) for name in ("min_letters", "max_symbols", "max_bullets", "max_ellipses")
    }
    return {
        "too_short": partial(filters.drop_short, min_chars=recipe.min_chars),
        **({"ad_spam": filters.drop_ads} if recipe.drop_ads else {}),
        "repetition": partial(
            filters.drop_repetition, max_repeated=recipe.max_repeated, max_top=recipe.max_top_run
        ),
        "symbols": partial(filters.drop_symbols, **shares),
        **({"language": partial(language.drop_language, languages=kept)} if kept else {}),
    }


def clean(document: Document, steps: dict[str, Rule], effects: Effects) -> tuple[Document, str | None]:
    """All rules in order; the first reason to drop ends it."""
    for name, rule in steps.items():
        after, reason = rule(document)
        if reason:
            return after, reason
        if after is not document:
            effects.note(name, document, after)
            document = after
    return document, None


def tidied(record: Record) -> tuple[Record, str | None]:
    """The tidy record, or why to drop it: nothing visible is left of a text, or nothing is preferred."""
    after = tidy(record)
    if isinstance(after, Preference) and after.chosen == after.rejected:
        return after, "equal_answers"
    return after, "nothing_visible" if _said(after) < _said(record) else None


def _said(record: Record) -> int:
    """How many texts of a record say something."""
    return sum(bool(text.strip()) for text in _texts(record))


def _texts(record: Record) -> tuple[str, ...]:
    """The texts of a record that a model reads or writes."""
    if isinstance(record, Extraction):
        return (record.text, *(name for t in record.relation for name in (t.head, t.relation, t.tail)))
    return texts_of(record)


def tidy(record: Record) -> Record:
    """A conversation, extraction or preference without invisible characters and in NFC."""
    if isinstance(record, Conversation):
        tools = tuple(map(_plain, record.tools))
        return replace(record, messages=_tidy_messages(record.messages), tools=tools)
    if isinstance(record, Preference):
        return replace(
            record,
            prompt=_tidy_messages(record.prompt),
            chosen=_plain(record.chosen),
            rejected=_plain(record.rejected),
            tools=tuple(map(_plain, record.tools)),
        )
    if isinstance(record, Extraction):
        return replace(record, text=_plain(record.text), relation=tuple(map(_tidy_triple, record.relation)))
    return record


def _tidy_messages(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(
        Message(m.role, _plain(m.content), _plain(m.reasoning), tuple(map(_tidy_call, m.tool_calls)))
        for m in messages
    )


def _tidy_call(call: ToolCall) -> ToolCall:
    return ToolCall(_plain(call.name), _plain(call.arguments))


def _tidy_triple(triple: Triple) -> Triple:
    return replace(
        triple, head=_plain(triple.head), relation=_plain(triple.relation), tail=_plain(triple.tail)
    )


def _plain(text: str) -> str:
    return normalised("NFC", visible(text))


def glimpse(document: Document) -> str:
    """Where the document comes from and how it begins, without what is a person's."""
    return f"{document.source}: {privacy.masked(document.text[:GLIMPSE_CHARS])[:60]!r}"


def _difference(before: str, after: str) -> str:
    """The first place where two texts part, 40 characters of each, without what is a person's."""
    first = max(_parting(before, after) - GLIMPSE_CHARS, 0)
    before, after = (text[first : first + 2 * GLIMPSE_CHARS] for text in (before, after))
    old, new = privacy.masked(before), privacy.masked(after)
    if old == new:
        start = max(_parting(before, after) - 8, 0)
        return repr(new[start : start + 40])
    start = max(_parting(old, new) - 8, 0)
    return f"{old[start : start + 40]!r} became {new[start : start + 40]!r}"


def _parting(before: str, after: str) -> int:
    low, high = 0, min(len(before), len(after))
    while low < high:  # the longest beginning that they share
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before[low:middle] == after[low:middle] else (low, middle - 1)
    return low
