"""`microlm data audit`: data that is there, counted anew. `data show` is in `show`, `prepare` in `run`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from microlm.cli.show import plain, show

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
            typer.echo(f"{plain(name):<{width}}  {plain(value)}")
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
            typer.echo(f"  {plain(line)}", err=True)
    if failed:
        raise CheckFailed(", ".join(f"{g['name']} is {figure(g['name'], g['value'])}" for g in failed))
