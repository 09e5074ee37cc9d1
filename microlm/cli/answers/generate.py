"""`microlm generate`: a prompt → its continuation on stdout, or a file of prompts → a file of answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microlm.cli.answers.engine_options import Adapters, EngineOptions, load_adapters, warm
from microlm.cli.answers.options import AsJson, Base, ConstraintOptions, SamplingOptions
from microlm.cli.answers.texts import printable
from microlm.core.errors import CheckFailed, UserError
from microlm.core.records import Completion, Message, Sampling

if TYPE_CHECKING:
    from microlm.cli.answers.file import Question
    from microlm.engine import Engine

BATCH = 64  # answers to a file of prompts that are made at once
MAX_NEW_TOKENS = 128
SCHEMA = 1


def generate(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="a run, one of its stages, or a model directory")
    ],
    prompt: Annotated[str | None, typer.Argument(help="the text to continue; - reads it from stdin")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="F.jsonl", help='a file of {"prompt": …} lines')
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="answers to --prompts; default: F.answers.jsonl")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="ask through the chat template")] = False,
    base: Base = False,
    n: Annotated[int, typer.Option("-n", help="so many answers to each prompt")] = 1,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="log-probabilities, and of so many likeliest tokens")
    ] = None,
    adapter: Adapters = None,
    as_json: AsJson = False,
    *,
    draws: SamplingOptions,
    bounds: ConstraintOptions,
    runs: EngineOptions,
) -> None:
    """Continue a text, or answer a file of prompts.

    With --prompts the same command takes up an interrupted file where it was. A line may have settings of
    its own: max_tokens, temperature, seed, stop, constraint, adapter …

    \b
    Example:
      microlm generate runs/quickstart "李白是" --base
      microlm generate runs/quickstart "李白是谁？" --chat --choice 诗人 --choice 画家
      microlm generate runs/quickstart --chat --prompts questions.jsonl --out answers.jsonl
    """
    if (prompt is None) == (prompts is None):
        raise UserError("generate: found no prompt, or two; give either PROMPT or --prompts FILE")
    sampling = draws.sampling(MAX_NEW_TOKENS, bounds.constraint(), n=n, logprobs=logprobs)
    arguments = runs.arguments(max_seqs=BATCH if prompts else max(n, 1))

    from microlm.engine import Engine
    from microlm.engine.resolve import resolve_model_dir

    engine = Engine(resolve_model_dir(directory, base=base), **arguments)
    places, for_all = load_adapters(engine, adapter or ())
    if prompts is not None:
        from microlm.cli.answers.file import Question, settings_of

        question = Question(sampling, chat, for_all, tuple(places))
        settings = settings_of(engine, question, arguments, places)
        _answer_all(engine, question, settings, prompts, out, as_json=as_json)
        return
    if places and for_all is None:
        raise UserError("--adapter: NAME= is for lines of --prompts; for one PROMPT give the directory alone")
    text = sys.stdin.read() if prompt == "-" else str(prompt)
    _answer_one(
        engine, [Message("user", text)] if chat else text, sampling, for_all, text if as_json else None
    )


def _answer_all(
    engine: Engine,
    question: Question,
    settings: dict[str, Any],
    source: Path,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Answer a file of prompts into another; CheckFailed when some of the answers are errors."""
    from microlm.cli.answers.file import answer_file

    target = out or source.with_name(source.name.removesuffix(".jsonl") + ".answers.jsonl")
    summary = answer_file(engine, source, target, question, settings)
    typer.echo(json.dumps(summary, ensure_ascii=False) if as_json else _told(summary))
    if failed := summary["errors"] + summary["cut"]:
        raise CheckFailed(f"generate: {failed} answers failed; their rows in {target} have an 'error'")


def _answer_one(
    engine: Engine, asked: str | list[Message], sampling: Sampling, adapter: str | None, told: str | None
) -> None:
    """Print the answers: as they come, several one after the other, or as JSON (`told`: the prompt)."""
    if told is None and sampling.n == 1 and sampling.logprobs is None:
        deltas = engine.stream(asked, sampling, adapter=adapter)
        warm(engine)
        for delta in deltas:
            typer.echo(printable(delta.text), nl=False)
            if delta.finish_reason:
                typer.echo()
                _complain(delta.finish_reason, delta.error)
        return
    from microlm.cli.answers.file import rows_of

    done: list[Completion] = engine.generate([asked], sampling, adapter=adapter)
    rows = rows_of(done, engine.tokenizer)
    if told is not None:
        first = {"schema": SCHEMA, "prompt": told} | rows[0]
        typer.echo(json.dumps(first | ({"more": rows[1:]} if rows[1:] else {}), ensure_ascii=False))
    else:
        for row in rows:
            _show(row)
    for completion in done:
        _complain(completion.finish_reason, completion.error)


def _show(row: dict[str, Any]) -> None:
    """An answer for people; where log-probabilities are asked for, a line for each token."""
    if "index" in row:
        typer.echo(f"[{row['index'] + 1}] ", nl=False)
    typer.echo(printable(row["text"]))
    for known in row.get("logprobs", ()):
        others = "  ".join(f"{token}:{value:.3f}" for token, value in known.get("top", ()))
        typer.echo(f"{known['logprob']:9.4f}  {known['id']:6d}  {known['token']!r}  {others}".rstrip())


def _complain(finish_reason: str, error: str) -> None:
    if finish_reason == "error":
        raise UserError(f"generate: {error}")
    if error:  # cut off inside a constraint: what was printed is not what was asked for
        raise CheckFailed(f"generate: {error}")


def _told(summary: dict[str, Any]) -> str:
    parts = [f"{summary['out']}: {summary['prompts']} prompts answered"]
    if summary["resumed_at"]:
        parts.append(f"taken up at {summary['resumed_at']}")
    if summary["errors"]:
        parts.append(f"{summary['errors']} answers are errors")
    if summary["cut"]:
        parts.append(f"{summary['cut']} were cut off inside their constraint")
    if summary["tokens_per_s"]:
        parts.append(f"{summary['tokens_per_s']:,.0f} tokens/s")
    return ", ".join(parts)
