"""Samples as training sees them. Enters: records and a tokenizer, or token sets. Leaves: labels, glyphs.

A glyph is the fewest tokens that make whole characters; what is never whole is shown as its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.core.recipe import nearest
from microlm.core.records import Conversation, Document
from microlm.text.chat import encode_chats
from microlm.text.encoding import INDEX
from microlm.text.read import Record
from microlm.text.shards import TokenSet, open_sets
from microlm.text.tokenizer import Tokenizer

LABEL, CUT, PIECE = "⟦⟧", "⟪⟫", "✂"
"""Marks for who sees no colours: around what is learnt, around what no row holds, where a piece begins."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A sample: where it comes from, its task, ids, and 1 for each that is a label."""

    place: str
    task: str
    ids: Sequence[int]
    mask: Sequence[int]


@dataclass(frozen=True, slots=True)
class Glyph:
    """Tokens that make up a text; `learnt` if they are labels of a row, `kept` if a row holds them."""

    ids: tuple[int, ...]
    text: str
    learnt: bool
    kept: bool
    begins: bool
    control: bool


def encoded(tokenizer: Tokenizer, places: Iterable[tuple[str, Record]]) -> Iterator[Encoded]:
    """Conversations and documents as the stage `tokenize` encodes them; other records are a UserError."""
    for place, record in places:
        if isinstance(record, Conversation):
            [(ids, mask)] = encode_chats(tokenizer, [record])
            yield Encoded(place, record.task, ids, mask)
        elif isinstance(record, Document):
            ids = [*tokenizer.encode(record.text), tokenizer.eos_id]
            yield Encoded(place, "documents", ids, [1] * len(ids))
        else:
            name = type(record).__name__.lower()
            raise UserError(f"{place}: a record of the kind {name} is not trained on; choose another --kind")


def is_shards(where: str) -> bool:
    """Whether a place holds token sets."""
    return (Path(where) / INDEX).is_file()


def draw(folder: Path, split: str, task: str | None, count: int, seed: int) -> tuple[list[Encoded], int]:
    """`count` samples of a split's token sets, drawn by seed, and of how many; no task: of any chat."""
    sets = open_sets(folder, "" if task else "conversations-", split)
    if task is not None and task not in sets:
        raise UserError(f"{folder}: no token set '{task}' for {split}; {nearest(task, sets)}")
    chosen = {name: tokens for name, tokens in sorted(sets.items()) if task in (None, name)}
    total = sum(len(tokens.ends) for tokens in chosen.values())
    drawn = sorted(runtime.rng(seed, "show").sample(range(total), min(count, total)))
    return [_sample(chosen, number) for number in drawn], total


def _sample(sets: dict[str, TokenSet], number: int) -> Encoded:
    name = next(iter(sets))
    for name in sets:
        if number < len(sets[name].ends):
            break
        number -= len(sets[name].ends)
    tokens = sets[name]
    start, end = int(tokens.ends[number - 1]) if number else 0, int(tokens.ends[number])
    ids = tokens.tokens[start:end].tolist()
    mask = [1] * len(ids) if tokens.loss is None else tokens.loss[start:end].tolist()
    return Encoded(f"{tokens.name}:{number}", name, ids, mask)


def glyphs(tokenizer: Tokenizer, sample: Encoded, spans: Sequence[Span]) -> Iterator[Glyph]:
    """The sample's glyphs; rows hold its `spans`, and the first token of a span has nothing to predict it."""
    names = {number: token for token, number in tokenizer.control.items()}
    kept = {i for start, end in spans for i in range(start, end)}
    learnt = {i for start, end in spans for i in range(start + 1, end) if sample.mask[i]}
    begins = {start for start, _ in spans if start - 1 in kept}
    held: list[int] = []

    def glyph(last: int) -> Glyph:
        first = last + 1 - len(held)
        ids = tuple(sample.ids[first : last + 1])
        control = ids[0] in names
        raw = b"".join(tokenizer.token_bytes[i] for i in ids)
        text = names[ids[0]] if control else raw.decode("utf-8", "backslashreplace")
        held.clear()
        return Glyph(ids, text, last in learnt, last in kept, first in begins, control)

    for i, token in enumerate(sample.ids):
        alike = (i in learnt, i in kept) == (i - 1 in learnt, i - 1 in kept)
        if held and (not alike or i in begins or token in names):
            yield glyph(i - 1)
        held.append(token)
        if token in names or not _may_go_on(b"".join(tokenizer.token_bytes[t] for t in held)):
            yield glyph(i)
    if held:
        yield glyph(len(sample.ids) - 1)


def _may_go_on(raw: bytes) -> bool:
    """Whether bytes end in the midst of a character that is sound so far."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as e:
        return e.reason == "unexpected end of data"
    return False


def marked(found: Iterable[Glyph]) -> str:
    """The text with marks around what is learnt and around what is cut away."""
    out = []
    for kept, run in groupby(found, key=lambda g: g.kept):
        inner = []
        for learnt, some in groupby(run, key=lambda g: g.learnt):
            text = "".join(PIECE * g.begins + g.text for g in some)
            inner.append(f"{LABEL[0]}{text}{LABEL[1]}" if learnt else text)
        out.append("".join(inner) if kept else f"{CUT[0]}{''.join(inner)}{CUT[1]}")
    return "".join(out)


def to_json(sample: Encoded, found: Sequence[Glyph], spans: Sequence[Span]) -> dict[str, object]:
    """The sample for programs."""
    listed = [{"ids": g.ids, "text": g.text, "learnt": g.learnt, "kept": g.kept} for g in found]
    return {
        "place": sample.place,
        "task": sample.task,
        "tokens": len(sample.ids),
        "labels": sum(sample.mask),
        "spans": spans,
        "text": marked(found),
        "glyphs": listed,
    }
