"""`microlm tokenizer`: train, encode, show, export (`eval` and `compare` are in `compare`).

Enters: recipes, texts, tokenizers of anyone's making. Leaves: ids, pages, files for other programs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microlm.cli.run import AsJson, DryRun

if TYPE_CHECKING:
    from microlm.cli.pipeline import Planned

TOKENIZER = (
    "a directory, tokenizer.json, .tiktoken, .model, vocab.txt, package:NAME, or owner/name of the hub"
)
MAX_TEXTS = 500  # of each domain
MAX_CHARS = 4_000  # shown in a terminal

Directory = Annotated[
    str, typer.Argument(metavar="TOKENIZER", help="the directory of a tokenizer or model, or builtin:zh-6400")
]
Page = Annotated[Path | None, typer.Option("--out", metavar="FILE.html", help="write a page with pictures")]
Sources = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="FILE", help="raw texts, or KIND:FILE as in data.source; repeatable"),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the group `tokenizer`, which `run` has made."""
    for command in (train, encode, show, export):
        group_of(app).command(command.__name__)(command)


def group_of(app: typer.Typer) -> typer.Typer:
    """The group `tokenizer`."""
    group = next(g.typer_instance for g in app.registered_groups if g.name == "tokenizer")
    assert group is not None
    return group


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]…", help="a recipe file or name, and values to set"),
    ] = None,
    source: Sources = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="where the tokenizer goes, with --source")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab-size", help="entries of the vocabulary")] = None,
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", help="bpe, unigram, wordpiece or sentencepiece")
    ] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Train a tokenizer: by a recipe, or on raw files with --source and --out.

    RECIPE is a recipe of this one stage (stage: tokenizer), or a pipeline: then every stage up to its last
    'tokenizer' stage is run. KEY=VALUE sets any field of the stage. What is finished already is skipped.

    \b
    Examples:
      microlm tokenizer train recipes/quickstart.yaml tokenizer.vocab_size=4000
      microlm tokenizer train --source my.jsonl.zst --out runs/mine --vocab-size 6400
      microlm tokenizer train data=runs/quickstart/data pattern=qwen digits=runs --out runs/mine
    """
    from microlm.cli import run

    recipe, changes = _recipe_and_changes(words or [])
    options = [f"vocab_size={vocab_size}"] if vocab_size is not None else []
    options += [f"algorithm={algorithm}"] if algorithm is not None else []
    has_texts = bool(source) or any(word.startswith("data=") for word in changes)
    if out and has_texts and recipe is None:
        plan = plan_of_files(source or [], out, [*changes, *options])
        run.execute(plan, "command line", as_json=as_json, dry_run=dry_run)
    elif recipe is not None and not source and out is None:
        changes += [f"tokenizer.{option}" for option in options]
        plan = run.plan_of(Path(recipe), changes, "tokenizer")
        run.execute(plan, recipe, as_json=as_json, dry_run=dry_run)
    else:
        raise typer.BadParameter("give either a RECIPE, or --source FILE (or data=DIR) and --out DIR")


def _recipe_and_changes(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe's file or name, which comes first if there is one, and the KEY=VALUE words."""
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return words[0], list(words[1:])
    return None, list(words)


def plan_of_files(source: Sequence[str], out: str, words: Sequence[str]) -> list[Planned]:
    """The plan of one stage `tokenizer` that learns from raw files, or from what the words name."""
    from microlm.cli import pipeline, stages

    data = {"stage": "tokenizer", "out": out}
    texts = {"source": [_source_word(word) for word in source]} if source else {}
    return pipeline.resolve(data | texts, words, stages.input_fields, "command line")


def _source_word(word: str) -> str:
    """FILE → KIND:FILE by its ending; a word with a kind stays, and so does a data artifact."""
    from microlm.core.storage import MANIFEST
    from microlm.text import sources
    from microlm.text.sources.files import SUFFIXES, suffix

    if sources.is_word(word) or (Path(word) / MANIFEST).is_file():
        return word
    kind = next(
        (k for k in ("jsonl", "parquet", "csv", "markdown") if suffix(Path(word)) in SUFFIXES[k]), "text"
    )
    return f"{kind}:{word}"


def encode(
    tokenizer: Directory,
    text: Annotated[str | None, typer.Argument(help="the text; without it standard input is read")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source", metavar="FILE", help="files or data artifacts in place of a text; repeatable"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="where the token sets of --source go")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, max=64, help="for --source")] = 1,
    control: Annotated[
        bool, typer.Option("--control", help="control tokens in the text become their ids")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a text into ids, or files into token sets that training reads.

    Control tokens in a text stay text unless --control is given. Of files, what cannot be used is dropped and
    counted; each document ends with the end token, conversations have a loss mask.

    \b
    Examples:
      microlm tokenizer encode runs/quickstart/tokenizer 床前明月光
      microlm tokenizer encode runs/quickstart/tokenizer --control '<|im_start|>user' --json
      microlm tokenizer encode runs/quickstart/tokenizer --source my.jsonl.zst --out runs/mine/shards
    """
    if bool(source) != (out is not None) or (source and (control or text is not None)):
        raise typer.BadParameter("give a TEXT, or --source FILE and --out DIR, without TEXT and --control")
    from microlm.core.storage import local_path

    folder = local_path(tokenizer)
    if source and out:
        from microlm.text.encoding import encode_files

        index = encode_files([_source_word(word) for word in source], folder, out, processes)
        if as_json:
            typer.echo(json.dumps({**index, "path": str(out)}, ensure_ascii=False))
        for name, counts in index["sets"].items() if not as_json else ():
            typer.echo(f"{name}: " + ", ".join(f"{count:,} {unit}" for unit, count in counts.items()))
        return
    from microlm.text.tokenizer import Tokenizer

    ids = Tokenizer.load(folder).encode(_text(text), allow_control=control)
    if as_json:
        typer.echo(json.dumps({"schema": 1, "ids": ids}))
    else:
        typer.echo(" ".join(map(str, ids)))


def _text(word: str | None) -> str:
    """The text of an argument, or of standard input, as UTF-8."""
    from microlm.core.errors import UserError

    data = sys.stdin.buffer.read() if word is None else word.encode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"the text: byte {e.start} is not UTF-8; convert it first") from None


def show(
    text: Annotated[str, typer.Argument(metavar="TEXT|FILE", help="a text, or the file that holds it")],
    tokenizer: Annotated[
        list[str], typer.Option("--tokenizer", metavar="TOKENIZER", help=f"{TOKENIZER}; may be repeated")
    ],
    out: Page = None,
    as_json: AsJson = False,
) -> None:
    """Show how a text is cut: every token in a colour of its own, unknown ones red, dropped ones struck out.

    A small number counts the tokens of a part, where several tokens make one character. Where there is no
    terminal, lines stand between the tokens.

    \b
    Examples:
      microlm tokenizer show 学而时习之 --tokenizer runs/quickstart/tokenizer --tokenizer package:dashscope
      microlm tokenizer show poem.txt --tokenizer runs/quickstart/tokenizer --out poem.html
    """
    from microlm.core import storage
    from microlm.text.vocab import compare, page
    from microlm.text.vocab.peers import open_peer

    whole = _text_or_file(text)
    peers = [open_peer(word) for word in tokenizer]
    rows = {peer.name: compare.cut_of(peer, whole) for peer in peers}
    if out:
        storage.write_atomic(out, page.cuts(whole, rows).encode("utf-8"))
    if as_json:
        cuts = {name: [part._asdict() for part in row] for name, row in rows.items()}
        typer.echo(json.dumps({"schema": 1, "text": whole, "cuts": cuts}, ensure_ascii=False))
    else:
        _print_cuts(rows)


def _print_cuts(rows: Mapping[str, Sequence[Any]]) -> None:
    from rich.console import Console

    from microlm.text.vocab import view

    console = Console(highlight=False)
    for name, row in rows.items():
        console.print(f"{name}: {sum(part.tokens for part in row):,} tokens", style="bold", markup=False)
        kept, size = [], 0
        for part in row:
            if size >= MAX_CHARS:
                break
            kept.append(part)
            size += len(part.text)
        if console.is_terminal:
            console.print(view.coloured(kept))
        else:
            typer.echo("│".join(map(view.shown, kept)))
        if more := sum(len(part.text) for part in row[len(kept) :]):
            console.print(f"… {more:,} more characters", style="dim")


def _text_or_file(word: str) -> str:
    path = Path(word)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a text may be too long for a name
        is_file = False
    if not is_file:
        return _text(word)
    from microlm.cli.answers.texts import read_text

    return read_text(path)


def export(
    tokenizer: Directory,
    tiktoken: Annotated[
        Path | None,
        typer.Option("--tiktoken", metavar="FILE", help="ranks, and FILE.json for tiktoken.Encoding"),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", metavar="FILE", help="the vocabulary for llama.cpp")
    ] = None,
    hf: Annotated[Path | None, typer.Option("--hf", metavar="DIR", help="the files for transformers")] = None,
    lines: Annotated[
        Path | None, typer.Option("--lines", metavar="FILE", help="texts to compare on, in place of our own")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="compare ids before anything is kept")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write a tokenizer for other programs, and compare their ids with ours line by line.

    A difference names the first text that differs, the exit code is 1, and nothing is written.

    \b
    Examples:
      microlm tokenizer export runs/quickstart/tokenizer --tiktoken mine.tiktoken --hf mine
      microlm tokenizer export runs/mine --gguf mine.gguf --lines held_out.txt
    """
    from microlm.core.storage import local_path
    from microlm.text.vocab import domains
    from microlm.text.vocab import export as forms

    targets = {"tiktoken": tiktoken, "gguf": gguf, "hf": hf}
    asked = {name: target for name, target in targets.items() if target is not None}
    if not asked:
        raise typer.BadParameter("name what to write: --tiktoken FILE, --gguf FILE or --hf DIR")
    texts = list(domains.texts_of_file(lines)) if lines else forms.sample_lines()
    folder = local_path(tokenizer)
    made = [forms.FORMS[name](folder, target, texts, check=check) for name, target in asked.items()]
    if as_json:
        typer.echo(json.dumps({"schema": 1, "written": [m._asdict() for m in made]}, ensure_ascii=False))
        return
    for m in made:
        told = f"{m.program} gives the same ids on {m.lines:,} lines" if m.lines else "not compared"
        typer.echo(f"{m.path}: {told}")
