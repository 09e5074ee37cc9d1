"""`microlm tokenizer eval` and `compare`: tokenizers of anyone's making, measured on the same texts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microlm.cli.run import AsJson
from microlm.cli.tokenizer import TOKENIZER, Page, Sources, group_of, plan_of_files

if TYPE_CHECKING:
    from microlm.text.vocab import budget
    from microlm.text.vocab.domains import Domains
    from microlm.text.vocab.peers import Peer

MAX_TEXTS = 500  # of each domain
DomainFiles = Annotated[
    list[str] | None,
    typer.Option("--domain", metavar="NAME=FILE", help="texts to measure on, by domain; may be repeated"),
]
Data = Annotated[
    str | None, typer.Option("--data", metavar="DIR", help="a data artifact; its validation texts are used")
]


def register(app: typer.Typer) -> None:
    """Add both commands to the group `tokenizer`, which `run` has made."""
    group = group_of(app)
    group.command("eval")(evaluate)
    group.command("compare")(compare)


def evaluate(
    tokenizer: Annotated[str, typer.Argument(metavar="TOKENIZER", help=TOKENIZER)],
    domain: DomainFiles = None,
    data: Data = None,
    out: Page = None,
    as_json: AsJson = False,
) -> None:
    """Measure a tokenizer by domain: bytes per token, tokens per character, what it loses.

    Without --domain and --data: short texts that come with MicroLM (modern and classical Chinese, English,
    code, JSON, dialogue), a few kilobytes each.

    \b
    Examples:
      microlm tokenizer eval runs/quickstart/tokenizer
      microlm tokenizer eval runs/quickstart/tokenizer --data runs/quickstart/data --out eval.html
      microlm tokenizer eval package:dashscope --domain poems=poems.txt --domain logs=logs.jsonl
    """
    from microlm.text.vocab.compare import compare as measure_all
    from microlm.text.vocab.peers import open_peer

    report = measure_all([open_peer(tokenizer)], _domains(domain, data), [])
    _tell(report, tokenizer, out, as_json=as_json)


def compare(
    tokenizers: Annotated[
        list[str] | None, typer.Argument(metavar="TOKENIZER…", help=f"{TOKENIZER}; NAME=… names it")
    ] = None,
    domain: DomainFiles = None,
    data: Data = None,
    sizes: Annotated[
        str | None, typer.Option("--sizes", metavar="N,N,…", help="also train one of each size on --source")
    ] = None,
    source: Sources = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL", help="4m, 26m, 31m, 64m, 110m, or HIDDENxLAYERS"),
    ] = None,
    out: Page = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokenizers side by side, and what their vocabularies cost a model of a given size.

    With --sizes a tokenizer of each size is trained, so that the size can be chosen from data: bytes per
    token against the embedding's share of the parameters.

    \b
    Examples:
      microlm tokenizer compare runs/quickstart/tokenizer qwen=package:dashscope --out compare.html
      microlm tokenizer compare runs/mine bge=bge-small-zh/vocab.txt --domain poems=poems.txt
      microlm tokenizer compare --sizes 3200,6400,12800 --source my.jsonl --model 26m --model 512x12
    """
    from microlm.text.vocab.compare import compare as measure_all
    from microlm.text.vocab.peers import open_peer

    if not tokenizers and not sizes:
        raise typer.BadParameter("name at least one TOKENIZER, or give --sizes N,N,… and --source FILE")
    if bool(sizes) != bool(source):
        raise typer.BadParameter("--sizes N,N,… and --source FILE go together")
    shapes = [shape_of(word) for word in model or ["26m", "64m"]]
    found = _domains(domain, data)
    peers = [open_peer(word) for word in tokenizers or []]
    trained = _trained(_numbers(sizes or ""), source or [])
    peers += trained
    twice = {p.name for p in peers if [q.name for q in peers].count(p.name) > 1}
    if twice:
        raise typer.BadParameter(
            f"two tokenizers are called '{min(twice)}'; name them, as in old={min(twice)}"
        )
    names = [p.name for p in trained]
    report = measure_all(peers, found, shapes, sizes=names)
    _tell(report, "Tokenizers side by side", out, as_json=as_json)


def shape_of(word: str) -> budget.Shape:
    """The sizes of a model that is named on the command line."""
    from microlm.model.presets import named_shape
    from microlm.text.vocab import budget

    shape = named_shape(word)
    parts = shape.config(1, 1, 1.0).parameter_parts()
    return budget.Shape(word, shape.hidden_size, sum(parts.values()) - parts["embedding"] - parts["head"])


def _numbers(words: str) -> list[int]:
    found = [word.strip() for word in words.split(",") if word.strip()]
    if not all(word.isdecimal() for word in found):
        raise typer.BadParameter(f"--sizes '{words}': expected whole numbers, such as 3200,6400")
    return sorted({int(word) for word in found})


def _trained(sizes: Sequence[int], source: Sequence[str]) -> list[Peer]:
    """A tokenizer of each size, trained by the stage in a folder that does not stay."""
    from microlm.cli import run
    from microlm.text.vocab.peers import open_peer

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            place = f"{folder}/{size}"
            plan = plan_of_files(source, place, [f"vocab_size={size}"])
            list(run.run_all(plan, run.build_all(plan, "--sizes")))
            found.append(open_peer(f"{size:,}={place}"))
    return found


def _domains(files: Sequence[str] | None, data: str | None) -> Domains:
    from microlm.core.manifest import open_artifact
    from microlm.text.vocab import domains

    found = domains.of_words(files or [], MAX_TEXTS)
    if data is not None:
        found |= domains.of_data(open_artifact(data), MAX_TEXTS)
    return found or domains.samples()


def _tell(report: dict[str, Any], title: str, out: Path | None, *, as_json: bool) -> None:
    """Write the page where one is asked for, and print the report."""
    from microlm.core import storage
    from microlm.text.vocab import page
    from microlm.text.vocab.compare import to_json

    if out:
        storage.write_atomic(out, page.comparison(report, title).encode("utf-8"))
    if as_json:
        typer.echo(json.dumps(to_json(report), ensure_ascii=False))
    else:
        _print(report)


def _print(report: Mapping[str, Any]) -> None:
    """A table of the domains, and one of the models."""
    names = [m["tokenizer"] for m in report["tokenizers"]]
    cells = {(r["domain"], r["tokenizer"]): r for r in report["rows"]}
    rows = [
        [domain, *(_figure(cells[domain, name]["bytes_per_token"]) for name in names)]
        for domain in report["domains"]
    ]
    for title, key in (("mean", "bytes_per_token"), ("tokens/character", "tokens_per_character")):
        rows.append([title, *(_figure(m[key]) for m in report["tokenizers"])])
    for title, key in (("entries", "vocab_size"), ("lost characters", "lost_characters")):
        rows.append([title, *(f"{m[key]:,}" for m in report["tokenizers"])])
    rows.append(["changed texts", *(f"{m['changed_texts']} of {m['texts']}" for m in report["tokenizers"])])
    _table("bytes per token", ["domain", *names], rows)
    models = list(dict.fromkeys(r["model"] for r in report["budget"]))
    shares = {(r["model"], r["tokenizer"]): r for r in report["budget"]}
    if models:
        _table(
            "embedding's share of the parameters, tied and untied",
            ["model", *names],
            [
                [m, *(f"{shares[m, n]['share_tied']:.1%} {shares[m, n]['share_untied']:.1%}" for n in names)]
                for m in models
            ],
        )


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if i else "left", overflow="fold", min_width=12)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=max(Console().width, 24 + 15 * len(heads))).print(table)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
