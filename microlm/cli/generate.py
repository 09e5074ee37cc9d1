"""`microlm generate`: a prompt → its continuation on stdout, or a file of prompts → a file of answers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microlm.core.errors import UserError
from microlm.core.records import Completion, Constraint, Message, Sampling

if TYPE_CHECKING:
    from microlm.engine import Engine, Request

BATCH = 64  # prompts of a file that run at once
SCHEMA = 1
Directory = Annotated[
    str, typer.Argument(metavar="DIR", help="a run, one of its stages, or a model directory")
]
Base = Annotated[bool, typer.Option("--base", help="of a run, take the pretrained model")]
MaxSeqLen = Annotated[
    int | None, typer.Option("--max-seq-len", help="window in tokens; default: the model's")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="new tokens at most")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token, 1 draws")]
TopP = Annotated[float, typer.Option("--top-p", help="draw from the likeliest tokens of this total mass")]
TopK = Annotated[int, typer.Option("--top-k", help="draw from the k likeliest tokens; 0: from all")]
Seed = Annotated[int | None, typer.Option("--seed", help="makes random draws repeatable")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]


def generate(
    directory: Directory,
    prompt: Annotated[str | None, typer.Argument(help="the text to continue; - reads it from stdin")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="F.jsonl", help='a file of {"prompt": …} lines')
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="answers to --prompts; default: F.answers.jsonl")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="ask through the chat template")] = False,
    base: Base = False,
    max_seq_len: MaxSeqLen = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", help="file with a JSON schema that the output must fit")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text, or answer a file of prompts.

    With --prompts the same command takes up an interrupted file where it was.

    \b
    Example:
      microlm generate runs/quickstart "李白是" --base
      microlm generate runs/quickstart "李白是谁？" --chat
      microlm generate runs/quickstart --chat --prompts questions.jsonl --out answers.jsonl
    """
    if (prompt is None) == (prompts is None):
        raise UserError("generate: found no prompt, or two; give either PROMPT or --prompts FILE")
    constraint = Constraint("json_schema", read_text(json_schema)) if json_schema else None
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, constraint=constraint)

    from microlm.engine import Engine
    from microlm.engine.resolve import resolve_model_dir

    folder = resolve_model_dir(directory, base=base)
    engine = Engine(folder, max_seqs=BATCH if prompts else 1, max_seq_len=max_seq_len)
    if prompts is not None:
        target = out or prompts.with_name(prompts.name.removesuffix(".jsonl") + ".answers.jsonl")
        summary = answer_file(engine, prompts, target, sampling, chat)
        typer.echo(json.dumps(summary, ensure_ascii=False) if as_json else _told(summary))
    else:
        text = sys.stdin.read() if prompt == "-" else str(prompt)
        _answer_one(engine, text, sampling, chat, as_json)


def printable(text: str) -> str:
    """Text without the control characters that would steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) >= 0xA0 else "�" for c in text)


def read_text(path: Path) -> str:
    """A UTF-8 file of the user's."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check the path") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None


def _answer_one(engine: Engine, prompt: str, sampling: Sampling, chat: bool, as_json: bool) -> None:
    asked = [Message("user", prompt)] if chat else prompt
    if as_json:
        done = engine.generate([asked], sampling)[0]
        typer.echo(json.dumps({"schema": SCHEMA, "prompt": prompt} | _row(done), ensure_ascii=False))
        return
    for delta in engine.stream(asked, sampling):
        typer.echo(printable(delta.text), nl=False)
        if delta.finish_reason == "error":
            raise UserError(f"generate: {delta.error}")
    typer.echo()


@dataclass(frozen=True)
class _Line:
    """One line of a prompts file: its prompt, and what is repeated in its answer."""

    prompt: str
    keep: dict[str, Any]


def answer_file(engine: Engine, source: Path, target: Path, sampling: Sampling, chat: bool) -> dict[str, Any]:
    """Answer every line of `source` into `target`, in its order; `target.unfinished` is continued.

    The first line of the part names the settings, so that answers of two settings never mix.
    """
    from microlm.core import storage
    from microlm.core.metrics import Progress

    lines = list(read_prompts(source))
    if target.exists():
        raise UserError(f"{target}: exists already; remove it, or choose another place with --out")
    part = target.with_name(target.name + ".unfinished")
    settings = {"model": model_digest(engine.directory), "chat": chat, "window": engine.max_seq_len}
    done = _resume(part, settings | asdict(sampling), lines)
    tokens, started = 0, time.monotonic()
    with storage.explain_write(part):
        with (
            part.open("a", encoding="utf-8", newline="\n") as file,
            Progress("generate", len(lines), "prompts") as bar,
        ):
            bar.update(done)
            for line, answer in zip(
                lines[done:], answers(engine, lines[done:], done, sampling, chat), strict=True
            ):
                file.write(json.dumps(line.keep | _row(answer), ensure_ascii=False) + "\n")
                file.flush()
                tokens += len(answer.token_ids)
                bar.update(1)
        rows = part.read_bytes().split(b"\n", 1)[1]
        storage.write_atomic(target, rows)
        part.unlink()
    seconds = time.monotonic() - started
    speed = round(tokens / seconds, 1) if tokens and seconds else None
    return {
        "schema": SCHEMA,
        "out": str(target),
        "prompts": len(lines),
        "resumed_at": done,
        "tokens": tokens,
        "tokens_per_s": speed,
    }


def model_digest(folder: Path) -> str:
    """The hash of all files that the answers depend on: weights, configuration, tokenizer."""
    from microlm.core.manifest import hash_file, sha256
    from microlm.text.tokenizer import FILES

    files = [*folder.glob("*.safetensors"), folder / "config.json", *(folder / name for name in FILES)]
    return sha256(json.dumps(sorted([f.name, hash_file(f)] for f in files if f.exists())).encode())


def answers(
    engine: Engine, lines: list[_Line], first: int, sampling: Sampling, chat: bool
) -> Iterator[Completion]:
    """Answers in the order of the lines, the engine's slots kept full. Line i draws with seed + i."""
    open_requests: dict[int, Request] = {}
    ready: dict[int, Completion] = {}
    entered = given = 0
    while given < len(lines):
        while entered < len(lines) and len(open_requests) < 2 * engine.max_seqs:
            line, own = lines[entered], sampling
            if sampling.seed is not None:
                own = replace(sampling, seed=(sampling.seed + first + entered) % 2**63)
            try:
                asked = [Message("user", line.prompt)] if chat else line.prompt
                open_requests[entered] = engine.enqueue(engine.prepare(asked, own, live=False))
            except UserError as e:  # one prompt that is too long must not end the others
                ready[entered] = Completion("", (), "error", 0, str(e))
            entered += 1
        engine.step()
        for i in [i for i, r in open_requests.items() if r.finish_reason]:
            ready[i] = engine.completion(open_requests.pop(i))
        while given in ready:
            yield ready.pop(given)
            given += 1


def read_prompts(path: Path) -> Iterator[_Line]:
    """The lines of a prompts file: `{"prompt": …}`, with an optional `id` that is repeated."""
    for number, raw in enumerate(read_text(path).split("\n"), 1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            raise UserError(f'{path}:{number}: not valid JSON; expected {{"prompt": "…"}}') from None
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise UserError(f'{path}:{number}: no \'prompt\' with a text; expected {{"prompt": "…"}}')
        yield _Line(value["prompt"], {k: value[k] for k in ("id", "prompt") if k in value})


def _row(answer: Completion) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.token_ids),
    }
    return row | ({"error": answer.error} if answer.error else {})


def _resume(part: Path, settings: dict[str, Any], lines: list[_Line]) -> int:
    """How many answers `part` holds; a line that was cut while being written is removed."""
    from microlm.core import storage

    head = json.dumps({"settings": settings}, ensure_ascii=False).encode() + b"\n"
    old = part.read_bytes() if part.exists() else b""
    whole = old[: old.rfind(b"\n") + 1].splitlines(keepends=True)
    if not whole:
        storage.write_atomic(part, head)
        return 0
    if whole[0] != head or not _are_answers(whole[1:], lines):
        raise UserError(
            f"{part}: was begun with other prompts or settings; remove it, or choose another --out"
        )
    storage.write_atomic(part, b"".join(whole))
    return len(whole) - 1


def _are_answers(rows: list[bytes], lines: list[_Line]) -> bool:
    try:
        prompts = [json.loads(row)["prompt"] for row in rows]
    except (ValueError, KeyError, TypeError):
        return False
    return prompts == [line.prompt for line in lines[: len(rows)]]


def _told(summary: dict[str, Any]) -> str:
    resumed = f", taken up at {summary['resumed_at']}" if summary["resumed_at"] else ""
    speed = f", {summary['tokens_per_s']:,.0f} tokens/s" if summary["tokens_per_s"] else ""
    return f"{summary['out']}: {summary['prompts']} answers{resumed}{speed}"
