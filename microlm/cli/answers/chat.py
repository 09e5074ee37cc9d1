"""`microlm chat`: a conversation with a model, or with an endpoint. Enters: lines; leaves: streamed replies.

Replies go to stdout, everything else to stderr, so that it also works in a pipe.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from microlm.cli.answers.engine_options import Adapters, EngineOptions
from microlm.cli.answers.generate import generate
from microlm.cli.answers.options import AsJson, Base, ConstraintOptions, SamplingOptions, grouped
from microlm.cli.answers.talk import Talker, TooLong, open_local, open_remote
from microlm.cli.answers.texts import printable
from microlm.core.errors import UserError
from microlm.core.records import Message

HELP = """/system TEXT   set the system message (without TEXT: remove it)
/reset         forget the conversation
/save FILE     write the conversation as one JSON line
/help          this list
/exit          leave (also Ctrl-D); Ctrl-C stops a reply"""
SCHEMA = 1
MAX_NEW_TOKENS = 256


def register(app: typer.Typer) -> None:
    """Add `generate` and `chat`."""
    app.command("generate")(grouped(generate))
    app.command("chat")(grouped(chat))


def chat(
    place: Annotated[
        str, typer.Argument(metavar="DIR|URL", help="a run, a model directory, or a server's URL")
    ],
    raw: Annotated[
        bool, typer.Option("--raw", help="the base model continues each line; no template, no memory")
    ] = False,
    base: Base = False,
    system: Annotated[str, typer.Option("--system", help="system message to begin with")] = "",
    model: Annotated[
        str, typer.Option("--model", help="at a URL: the model's name; default: the first")
    ] = "",
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="at a URL: file with the key (else MICROLM_API_KEY)")
    ] = None,
    adapter: Adapters = None,
    as_json: AsJson = False,
    *,
    draws: SamplingOptions,
    bounds: ConstraintOptions,
    runs: EngineOptions,
) -> None:
    """Talk with a model in the terminal; /help lists the commands.

    With --json every reply is one JSON line.

    \b
    Example:
      microlm chat runs/quickstart
      microlm chat runs/quickstart --raw
      microlm chat http://127.0.0.1:8000
    """
    sampling = draws.sampling(MAX_NEW_TOKENS, bounds.constraint())
    if place.startswith(("http://", "https://")):
        talker: Talker = open_remote(place, sampling, runs, adapter or (), model, api_key_file)
    else:
        talker = open_local(place, sampling, runs, adapter or (), base=base, raw=raw)
    try:
        Session(talker, raw=raw, system=system, as_json=as_json).run()
    finally:
        talker.close()


class Session:
    """The conversation so far and the loop over the user's lines."""

    def __init__(self, talker: Talker, *, raw: bool, system: str = "", as_json: bool = False) -> None:
        self.talker = talker
        self.raw = raw
        self.system = system
        self.as_json = as_json
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """What the model is asked with."""
        return ([Message("system", self.system)] if self.system else []) + self.turns

    def run(self) -> None:
        """Read and answer until the user leaves."""
        _prepare_input()
        self._note(f"{self.talker.name} — /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                break
            except KeyboardInterrupt:
                self._note("\nCtrl-D or /exit leaves")
                continue
            if line.strip() == "/exit":
                return
            try:
                self._take(line)
            except UserError as e:  # a mistake in one line does not end the conversation
                self._note(f"error: {e}")
        if sys.stdin.isatty():
            typer.echo(err=True)

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            self._command(*line[1:].strip().partition(" ")[::2])
        elif line.strip():
            self._answer(line)

    def _command(self, name: str, rest: str) -> None:
        rest = rest.strip()
        if name == "system":
            self.system = rest
            self._note("system message set" if rest else "no system message")
        elif name == "reset":
            self.turns.clear()
            self._note("forgotten")
        elif name == "save":
            self._save(rest)
        elif name == "help":
            self._note(HELP)
        else:
            raise UserError(f"/{name}: no such command; /help lists them")

    def _save(self, name: str) -> None:
        from microlm.core import storage

        if not name:
            raise UserError("/save: give the name of a file")
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        text = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        storage.write_atomic(Path(name).expanduser(), text.encode("utf-8", "replace"))
        self._note(f"{name}: {len(messages)} messages")

    def _answer(self, line: str) -> None:
        """Reply to a line; a turn that failed leaves the history as it was."""
        self.turns.append(Message("user", line))
        try:
            text = self._stream(line)
        except UserError:
            self.turns.pop()
            raise
        if self.raw:
            self.turns.clear()
        else:
            self.turns.append(Message("assistant", text))

    def _stream(self, line: str) -> str:
        while True:
            try:
                return self._show(line)
            except TooLong as e:
                self._forget_oldest(e)

    def _show(self, line: str) -> str:
        """Print a reply as it comes; Ctrl-C keeps what is there."""
        pieces: list[str] = []
        reason: str | None = None
        replies = self.talker.reply(line if self.raw else self.messages)
        try:
            for text, ended in replies:
                pieces.append(text)
                reason = ended or reason
                if not self.as_json:
                    typer.echo(printable(text), nl=False)
        except KeyboardInterrupt:
            reason = "cancelled"
        finally:
            replies.close()
        whole = "".join(pieces)
        if self.as_json:
            typer.echo(
                json.dumps({"schema": SCHEMA, "text": whole, "finish_reason": reason}, ensure_ascii=False)
            )
        else:
            typer.echo()
        notes = {
            "length": "cut: the reply reached its limit",
            "cancelled": "stopped",
            "error": "the model failed",
        }
        if reason in notes:
            self._note(f"[{notes[reason]}]")
        return whole

    def _forget_oldest(self, error: TooLong) -> None:
        """Drop the oldest question and its answer; the last question itself cannot be dropped."""
        if len(self.turns) <= 1:
            raise UserError(f"{error}; shorten the message, or the system message") from None
        second = next((i for i, m in enumerate(self.turns) if i and m.role == "user"), len(self.turns) - 1)
        del self.turns[:second]
        self._note(f"[the window is full: the oldest {second} messages were dropped]")

    def _note(self, text: str) -> None:
        typer.echo(text, err=True)


def _prepare_input() -> None:
    """Line editing on a terminal; bytes that are no text become an error sentence, not a crash."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (importing it is what gives input() its editing)
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(encoding="utf-8", errors="surrogateescape")
