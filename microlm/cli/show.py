"""`microlm data show`: some records as people read them, or as training sees them, token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microlm.cli.answers.options import grouped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from microlm.text.inspection.labelled import Encoded, Glyph, Span
    from microlm.text.inspection.show import Sample
    from microlm.text.tokenizer import Tokenizer

Option = typer.Option
MAX_CHARS, MAX_GLYPHS, MAX_WIDTH = 1_000, 4_000, 100
COLOURS = {
    "system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", "chosen": "green",
    "rejected": "red", "relation": "yellow", "text": "blue",
}  # fmt: skip
LEARNT, GIVEN, GONE = ("green", "bright_green"), ("white", "bright_black"), ("red strike", "red strike")
"""Styles of tokens, two each by turns: then one sees where a token ends."""


@dataclass(frozen=True)
class Choice:
    """Which records."""

    kind: Annotated[str | None, Option(help="documents, conversations, extraction, …")] = None
    split: Annotated[str | None, Option(help="train, validation or test")] = None
    task: Annotated[str | None, Option(help="only conversations of this task")] = None
    contains: Annotated[str | None, Option(help="only records that contain this text")] = None
    n: Annotated[int, Option("--n", min=1, help="records at most")] = 5
    seed: Annotated[int, Option(help="other records for another seed")] = 0


@dataclass(frozen=True)
class Training:
    """What training makes of them."""

    tokenizer: Annotated[
        Path | None, Option("--tokenizer", metavar="DIR", help="show tokens, those that are learnt in colour")
    ] = None
    context: Annotated[
        int | None, Option("--context", min=1, help="show what a row of so many tokens cannot hold")
    ] = None
    too_long: Annotated[
        str, Option("--too-long", help="of that: drop, cut_left, cut_right or split, as in sft.too_long")
    ] = "drop"


@grouped
def show(
    where: Annotated[
        str, typer.Argument(metavar="WHERE", help="a data artifact, a folder, a file, or token sets")
    ],
    choice: Choice,
    training: Training,
    as_json: Annotated[bool, Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Print some records, drawn by seed from all of them. Without --kind and --split: the first there is.

    With --tokenizer, and of token sets, the tokens are shown: in colour what is learnt, struck out what no
    row holds. Without a terminal, ⟦…⟧ is around what is learnt, ⟪…⟫ around what is cut, ✂ where pieces begin.

    \b
    Examples:
      microlm data show runs/quickstart/data --kind conversations --split validation
      microlm data show my.jsonl.zst --contains 李白 --n 2
      microlm data show my.jsonl --tokenizer runs/quickstart/tokenizer --context 256 --too-long cut_left
      microlm data show runs/quickstart/shards --task extraction
    """
    from microlm.core.errors import UserError
    from microlm.text.inspection import labelled

    if labelled.is_shards(where):
        _show_token_sets(Path(where), choice, training, as_json)
        return
    if training.context and not training.tokenizer:
        raise UserError("--context counts tokens; say whose with --tokenizer DIR")
    name, sample = _draw(where, choice, training)
    if training.tokenizer:
        from microlm.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(training.tokenizer)
        found = list(labelled.encoded(tokenizer, sample.records))
        _show_tokens(name, sample.matched, found, tokenizer, training, as_json)
    elif as_json:
        _print_json(name, sample)
    else:
        _print(name, sample)


def _draw(where: str, choice: Choice, training: Training) -> tuple[str, Sample]:
    """The part's name and the records; none is a UserError."""
    from microlm.core.errors import UserError
    from microlm.core.recipe import nearest
    from microlm.text.inspection import parts
    from microlm.text.inspection import show as records

    there = parts.find([where])
    talks = (choice.task or training.tokenizer) and any(p.kind == "conversations" for p in there.parts)
    part = parts.choose(there, choice.kind or ("conversations" if talks else None), choice.split)
    sample = records.draw(part, choice.n, choice.seed, choice.contains, choice.task)
    if sample.unreadable:
        typer.echo(f"{part.name}: {sample.unreadable:,} lines cannot be read", err=True)
    if sample.matched:
        return part.name, sample
    if choice.task and sample.tasks:
        raise UserError(
            f"{where}: {part.name} holds no task '{choice.task}'; {nearest(choice.task, sample.tasks)}"
        )
    what = "record" if choice.contains is None else f"record that contains '{plain(choice.contains)}'"
    raise UserError(f"{where}: {part.name} holds no {what}; choose another text, --kind or --split")


def _show_token_sets(folder: Path, choice: Choice, training: Training, as_json: bool) -> None:
    from microlm.core.errors import UserError
    from microlm.text.inspection import labelled
    from microlm.text.tokenizer import Tokenizer

    if choice.kind or choice.contains or training.tokenizer:
        raise UserError(
            f"{folder}: holds token sets, which have a tokenizer of their own and no texts; "
            "choose among them with --task and --split, or name a data artifact"
        )
    split = choice.split or "train"
    found, total = labelled.draw(folder, split, choice.task, choice.n, choice.seed)
    if not found:
        raise UserError(f"{folder}: holds no samples for {split}; choose another --task or --split")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    _show_tokens(f"{choice.task or 'conversations'}/{split}", total, found, tokenizer, training, as_json)


def _show_tokens(
    name: str, total: int, found: Sequence[Encoded], tokenizer: Tokenizer, training: Training, as_json: bool
) -> None:
    from microlm.text.inspection import labelled

    seen = [(sample, _spans(sample, training)) for sample in found]
    shown = [(sample, spans, list(labelled.glyphs(tokenizer, sample, spans))) for sample, spans in seen]
    if as_json:
        rows = [labelled.to_json(sample, glyphs, spans) for sample, spans, glyphs in shown]
        head = {"schema": 1, "part": name, "matched": total, "context": training.context}
        typer.echo(json.dumps(head | {"too_long": training.too_long, "records": rows}, ensure_ascii=False))
        return
    console = _console()
    for sample, spans, glyphs in shown:
        console.rule(plain(sample.place), align="left", style="dim")
        console.print(_told(sample, spans), style="dim", markup=False)
        if console.color_system is None or console.no_color:
            console.print(plain(labelled.marked(glyphs), kept="\n"), markup=False)
        else:
            console.print(_coloured(glyphs))
    console.print(f"{name}: {len(shown)} of {total:,}", style="dim", markup=False)


def _spans(sample: Encoded, training: Training) -> list[Span]:
    """What rows hold of a sample; all of it without --context."""
    import numpy as np

    from microlm.core.errors import UserError
    from microlm.core.recipe import nearest
    from microlm.text.shards import TokenSet
    from microlm.train.batches.spans import POLICIES, spans_of, unread

    policy = next((known for known in POLICIES if known == training.too_long), None)
    if policy is None:
        raise UserError(f"--too-long {training.too_long}: is unknown; {nearest(training.too_long, POLICIES)}")
    if training.context is None or sample.task == "documents":
        return [(0, len(sample.ids))]
    tokens = TokenSet("", np.array(sample.ids), np.array(sample.mask, np.uint8), np.array([len(sample.ids)]))
    found, _ = spans_of(tokens, training.context, unread(document_mask=True), policy)
    _, starts, ends = found.take(np.arange(len(found)))
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _told(sample: Encoded, spans: Sequence[Span]) -> str:
    """Task, tokens, labels, and what rows hold of them where it is not all."""
    size = len(sample.ids)
    words = f"task {sample.task} · {size:,} tokens · {sum(sample.mask):,} labels"
    if spans == [(0, size)]:
        return words
    pieces = ", ".join(f"{start:,}–{end:,}" for start, end in spans)
    return f"{words} · in rows: {pieces or 'nothing'}"


def _coloured(glyphs: Sequence[Glyph]) -> Text:
    from rich.text import Text

    from microlm.text.inspection.labelled import PIECE

    text = Text()
    for number, glyph in enumerate(glyphs[:MAX_GLYPHS]):
        styles = GONE if not glyph.kept else LEARNT if glyph.learnt else GIVEN
        style = f"bold {styles[number % 2]}" if glyph.control else styles[number % 2]
        text.append(PIECE * glyph.begins, "red")
        text.append(plain(glyph.text, kept="\n"), style)
    if len(glyphs) > MAX_GLYPHS:
        text.append(f" … ({len(glyphs) - MAX_GLYPHS:,} more)", "dim")
    return text


def _print_json(name: str, sample: Sample) -> None:
    from microlm.core.records import to_json

    found = [{"place": place, **to_json(record)} for place, record in sample.records]
    head = {"schema": 1, "part": name, "matched": sample.matched, "unreadable": sample.unreadable}
    typer.echo(json.dumps(head | {"records": found}, ensure_ascii=False))


def _print(name: str, sample: Sample) -> None:
    from microlm.text.inspection import show as records

    console = _console()
    for place, record in sample.records:
        console.rule(plain(place), align="left", style="dim")
        console.print(plain(records.head(record)), style="dim", markup=False)
        for role, words in records.turns(record):
            console.print(_turn(role, words))
    console.print(f"{name}: {len(sample.records)} of {sample.matched:,}", style="dim", markup=False)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    console.width = min(MAX_WIDTH, console.width)
    return console


def _turn(role: str, words: str) -> Text:
    """A role in its colour and what it says, not longer than is read on a screen."""
    from rich.text import Text

    more = f" … ({len(words) - MAX_CHARS:,} more characters)" if len(words) > MAX_CHARS else ""
    return Text.assemble(
        (f"{role} ", COLOURS.get(role, "bold")), plain(words[:MAX_CHARS], kept="\n"), (more, "dim")
    )


def plain(text: str, kept: str = "") -> str:
    """Text of a corpus for a terminal: control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
