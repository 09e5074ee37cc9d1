"""The bell: `microlm`. Enters: the command line. Leaves: an exit code (0 fine, 1 a check failed,
2 wrong input, 130 interrupted). Rooms are imported when a command needs them, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer
import typer.core

from microlm import __version__
from microlm.cli import adopt, compare, data, inspect, run, serve, tokenizer
from microlm.cli.answers import chat
from microlm.cli.training import commands as training
from microlm.core.errors import CheckFailed, UserError

__all__ = ["main", "make_app"]


class _Group(typer.core.TyperGroup):
    """Turns what a command raises into a sentence and an exit code; `--debug` shows the traceback too."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (UserError, CheckFailed, KeyboardInterrupt, OSError) as e:
            if ctx.params.get("debug"):
                traceback.print_exc()
            sys.exit(_explain(e))


def main(argv: list[str] | None = None) -> None:
    """The `microlm` command; always ends in SystemExit."""
    words = sys.argv[1:] if argv is None else list(argv)
    own = words[: words.index("--")] if "--" in words else words
    if "--debug" in own:  # it may stand anywhere, not only before the command
        words.remove("--debug")
        words.insert(0, "--debug")
    try:
        make_app()(words, prog_name="microlm")
    finally:
        _flush()


def make_app() -> typer.Typer:
    """The typer app with every command."""
    app = typer.Typer(
        cls=_Group,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        add_completion=False,
    )
    app.callback()(_top)
    for room in (run, data, tokenizer, training, adopt, compare, inspect, chat, serve):
        room.register(app)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"microlm {__version__}")
        raise typer.Exit


def _top(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MICROLM_DEBUG", help="show the traceback of an error")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version and leave", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """From raw text to a verified language-model service.

    \b
    Example:
      microlm run recipes/quickstart.yaml
      microlm chat runs/quickstart
    """


def _explain(error: BaseException) -> int:
    """Say on stderr what happened; returns the exit code. An error that is a bug is raised again."""
    if isinstance(error, KeyboardInterrupt):
        typer.echo("\ninterrupted", err=True)
        return 130
    if isinstance(error, CheckFailed):
        typer.echo(f"check failed: {_printable(error)}", err=True)
        return 1
    if isinstance(error, BrokenPipeError):
        _close_stdout()
        return 0
    if isinstance(error, UserError):
        typer.echo(f"error: {_printable(error)}", err=True)
        return 2
    from microlm.core import storage

    try:
        with storage.explain_write(getattr(error, "filename", None) or "write"):
            raise error
    except UserError as e:
        typer.echo(f"error: {_printable(e)}", err=True)
        return 2


def _printable(error: Exception) -> str:
    """The sentence on one line: names of files and keys come from outside and may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))


def _flush() -> None:
    """Write out stdout here, where a reader that has gone (`| head`) can still be met quietly."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()


def _close_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
