"""`microlm data audit` and `microlm data show`: data that is there, looked at. `data prepare` is in `run`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.text import Text

Where = Annotated[
    list[str],
    typer.Argument(
        metavar="WHERE…", help="a data artifact, a folder of that layout, or files as train=FILE test=FILE"
    ),
]
Context = Annotated[int, typer.Option("--context", min=1, help="tokens that training sees of a conversation")]
TokenizerDir = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="DIR", help="counts tokens: cut answers, loss masks")
]
FailOn = Annotated[
    list[str] | None,
    typer.Option("--fail-on", metavar="NAME>N,…", help="exit with 1 if a number of the audit is so"),
]
Near = Annotated[bool, typer.Option("--near/--no-near", help="look for near duplicates between splits too")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE.html", help="write the page, and FILE.json")]
Processes = Annotated[int, typer.Option("--processes", min=0, help="0: one a core, one for small data")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
SMALL_BYTES = 32 << 20
MAX_CHARS, MAX_WIDTH = 1_000, 100
COLOURS = {
    "system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", "chosen": "green",
    "rejected": "red", "relation": "yellow", "text": "blue",
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add both commands to the group `data`, which `run` has made."""
    group = next(g.typer_instance for g in app.registered_groups if g.name == "data")
    assert group is not None
    group.command("audit")(audit)
    group.command("show")(show)


def audit(
    where: Where,
    context: Context = 256,
    tokenizer: TokenizerDir = None,
    fail_on: FailOn = None,
    near: Near = True,
    out: Out = None,
    processes: Processes = 0,
    as_json: AsJson = False,
) -> None:
    """Count anew what lies in data files: lengths, languages, duplicates, leakage, masks, drift, licences.

    Nothing that 'data prepare' wrote about itself is believed. NAME of --fail-on is one of records,
    unreadable, duplicates, leakage, near_leakage, eos_cut, mask_errors, drift, unknown_licence,
    noncommercial_licence, sharealike_licence. A gate that fails names up to 20 records; the exit code is 1.

    \b
    Examples:
      microlm data audit runs/quickstart/data --out audit.html
      microlm data audit runs/quickstart/data --tokenizer runs/quickstart/tokenizer --fail-on 'eos_cut>0.01'
      microlm data audit train=my.jsonl validation=held_out.jsonl.zst --fail-on 'leakage>0,near_leakage>0'
    """
    from microlm.core import storage
    from microlm.text.inspection import audit_dir, gates, page, parts

    asked = gates.parse(fail_on or [], list(audit_dir.NUMBERS))
    gates.require_measured(asked, audit_dir.measured(tokenizer, near))
    found = parts.find(where)
    size = sum(part.source.size_bytes() or 0 for part in found.parts)
    workers = processes or (1 if size < SMALL_BYTES else os.cpu_count() or 1)
    told = audit_dir.audit(found, context, tokenizer, near, workers, asked)
    if out:
        storage.write_atomic(out, page.page(told, " ".join(where)).encode("utf-8"))
        listed = json.dumps(told, ensure_ascii=False, indent=1) + "\n"
        storage.write_atomic(out.with_suffix(".json"), listed.encode("utf-8"))
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False))
    else:
        rows = page.rows(told)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            typer.echo(f"{_plain(name):<{width}}  {_plain(value)}")
    _require(told)


def _require(told: Mapping[str, Any]) -> None:
    """Name the records of each gate that failed, and end with 1."""
    from microlm.core.errors import CheckFailed
    from microlm.text.inspection.page import figure

    failed = [gate for gate in told["gates"] if gate["failed"]]
    for gate in failed:
        lines = told["examples"].get(gate["name"], [])
        typer.echo(f"{gate['gate']}: {figure(gate['name'], gate['value'])}, first {len(lines)}:", err=True)
        for line in lines:
            typer.echo(f"  {_plain(line)}", err=True)
    if failed:
        raise CheckFailed(", ".join(f"{g['name']} is {figure(g['name'], g['value'])}" for g in failed))


def show(
    where: Annotated[str, typer.Argument(metavar="WHERE", help="a data artifact, a folder, or a file")],
    kind: Annotated[str | None, typer.Option(help="documents, conversations, extraction, …")] = None,
    split: Annotated[str | None, typer.Option(help="train, validation or test")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="records at most")] = 5,
    seed: Annotated[int, typer.Option(help="other records for another seed")] = 0,
    contains: Annotated[str | None, typer.Option(help="only records that contain this text")] = None,
    as_json: AsJson = False,
) -> None:
    """Print some records, drawn by seed from all of them. Without --kind and --split: the first there is.

    \b
    Examples:
      microlm data show runs/quickstart/data --kind conversations --split validation
      microlm data show my.jsonl.zst --contains 李白 --n 2
    """
    from microlm.core.errors import UserError
    from microlm.core.records import to_json
    from microlm.text.inspection import parts
    from microlm.text.inspection import show as records

    part = parts.choose(parts.find([where]), kind, split)
    sample = records.draw(part, n, seed, contains)
    if sample.unreadable:
        typer.echo(f"{part.name}: {sample.unreadable:,} lines cannot be read", err=True)
    if not sample.matched:
        what = "record" if contains is None else f"record that contains '{_plain(contains)}'"
        raise UserError(f"{where}: {part.name} holds no {what}; choose another text, --kind or --split")
    if as_json:
        found = [{"place": place, **to_json(record)} for place, record in sample.records]
        head = {"schema": 1, "part": part.name, "matched": sample.matched, "unreadable": sample.unreadable}
        typer.echo(json.dumps(head | {"records": found}, ensure_ascii=False))
        return
    _print(
        part.name, sample.matched, [(p, records.head(r), list(records.turns(r))) for p, r in sample.records]
    )


def _print(name: str, matched: int, found: list[tuple[str, str, list[tuple[str, str]]]]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    console.width = min(MAX_WIDTH, console.width)
    for place, head, turns in found:
        console.rule(_plain(place), align="left", style="dim")
        console.print(_plain(head), style="dim", markup=False)
        for role, words in turns:
            console.print(_turn(role, words))
    console.print(f"{name}: {len(found)} of {matched:,}", style="dim", markup=False)


def _turn(role: str, words: str) -> Text:
    """A role in its colour and what it says, not longer than is read on a screen."""
    from rich.text import Text

    more = f" … ({len(words) - MAX_CHARS:,} more characters)" if len(words) > MAX_CHARS else ""
    return Text.assemble(
        (f"{role} ", COLOURS.get(role, "bold")), _plain(words[:MAX_CHARS], kept="\n"), (more, "dim")
    )


def _plain(text: str, kept: str = "") -> str:
    """Text of a corpus for a terminal: control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
