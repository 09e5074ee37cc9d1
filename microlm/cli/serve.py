"""The commands `serve` and `verify`. Enter: words; leave: a listening server, or a verdict."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microlm.cli.answers.engine_options import EngineOptions, warm
from microlm.cli.answers.options import AsJson, grouped

if TYPE_CHECKING:
    from microlm.eval.verify.verdict import Line

KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="file with the API key (else MICROLM_API_KEY is read)")
]
MAX_SEQS = 16  # requests that run at once


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command("serve")(grouped(serve))
    app.command("verify")(verify)


def serve(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="a run, one of its stages, or a Hugging Face directory")
    ],
    host: Annotated[str, typer.Option(help="address to listen on; a public one needs a key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0 picks a free one")] = 8000,
    api_key_file: KeyFile = None,
    name: Annotated[str, typer.Option(help="the served model's name; default: the directory's")] = "",
    base: Annotated[bool, typer.Option("--base", help="of a run, serve the pretrained model")] = False,
    max_queue: Annotated[int, typer.Option(min=0, help="requests that may wait; more get HTTP 429")] = 64,
    as_json: AsJson = False,
    die_with_parent: Annotated[bool, typer.Option("--die-with-parent", hidden=True)] = False,
    *,
    runs: EngineOptions,
) -> None:
    """Serve a model over HTTP, as OpenAI does.

    Chat, completions, streaming, JSON schema. Listens on this machine only. Ctrl-C or SIGTERM lets
    running requests end, then stops.

    \b
    Example:
      microlm serve runs/quickstart --port 8000
    """
    from microlm.core import manifest, runtime
    from microlm.core.endpoint import is_loopback, read_key
    from microlm.serve import listen

    if die_with_parent:
        runtime.die_with_parent()
    arguments = runs.arguments(max_seqs=MAX_SEQS)
    api_key = read_key(api_key_file)
    listen.check_exposure(host, api_key)
    listener = listen.bind(host, port)
    _log_to_stderr()

    from microlm.engine import Engine
    from microlm.engine.resolve import resolve_model_dir
    from microlm.serve.gate import Limits
    from microlm.serve.server import create_app

    model_dir = resolve_model_dir(directory, base=base)
    name = name or Path(directory).resolve().name
    engine = Engine(model_dir, **arguments)
    warm(engine)
    app = create_app(
        engine, name, api_key, Limits(max_queue=max_queue, loopback_hosts_only=is_loopback(host))
    )
    url = listen.address_of(listener)
    signed = manifest.find(str(model_dir))
    card = {
        "schema": 1,
        "url": url,
        "model": name,
        "directory": str(model_dir),
        "window": engine.max_seq_len,
        "digest": signed.digest if signed else None,
        "checkpoint": signed.manifest.get("checkpoint") if signed else None,
    }
    door = listen.make_door(app, lambda: _announce(card, as_json=as_json, has_key=bool(api_key)))
    door.run([listener])
    if door.interrupted:
        raise typer.Exit(130)


def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="address of an OpenAI-compatible server")],
    smoke: Annotated[bool, typer.Option("--smoke", help="the smoke checks (so far all there is)")] = True,
    api_key_file: KeyFile = None,
    model: Annotated[str, typer.Option(help="the model to ask; default: the first one served")] = "",
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=1, help="limit of each request")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="folder for verdict.json and verdict.html")] = None,
    as_json: AsJson = False,
) -> None:
    """Check any OpenAI-compatible endpoint.

    Each line is pass, fail, not_offered, or not_shown (the model's answers do not let it be seen).
    Exit code 1 when a check failed.

    \b
    Example:
      microlm verify http://127.0.0.1:8000 --smoke
    """
    from microlm.core.client import Client
    from microlm.core.endpoint import read_key
    from microlm.eval.verify import verdict
    from microlm.eval.verify.smoke import SMOKE

    with Client(url, read_key(api_key_file), timeout_s) as client:
        result = verdict.judge(client, SMOKE, model or None, None if as_json else _show)
    if out is not None:
        verdict.write(result, out)
    typer.echo(json.dumps(result.to_json(), ensure_ascii=False) if as_json else result.summary())
    verdict.require_passed(result, out and out / "verdict.html")


def _announce(card: dict[str, Any], *, as_json: bool, has_key: bool) -> None:
    if as_json:
        typer.echo(json.dumps(card, ensure_ascii=False))
    else:
        key = "os.environ['MICROLM_API_KEY']" if has_key else "'none'"
        typer.echo(_SNIPPET.format(url=card["url"], model=card["model"], key=key))
    sys.stdout.flush()


_SNIPPET = """MicroLM serves '{model}' at {url}/v1 (Ctrl-C stops)

    from openai import OpenAI
    client = OpenAI(base_url='{url}/v1', api_key={key})
    reply = client.chat.completions.create(
        model='{model}', messages=[{{'role': 'user', 'content': 'Hello'}}])
    print(reply.choices[0].message.content)
"""


def _show(line: Line) -> None:
    typer.echo(f"{line.status:<12} {line.name:<12} {line.seconds:6.2f} s  {line.detail}")


def _log_to_stderr() -> None:
    """Requests and warnings as plain lines on stderr."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("microlm.serve").setLevel(logging.INFO)
