"""A file of prompts → a file of answers in the same order. What is finished is on disk, whatever happens.

`ANSWERS.unfinished` holds the settings, then the answers as they were finished, each with its line's digest.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from microlm.cli.answers.engine_options import warm
from microlm.cli.answers.prompts import Line, read_prompts
from microlm.core import storage
from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.core.records import Completion, Sampling
from microlm.engine import Engine
from microlm.engine.batch import Ask, finished
from microlm.text.tokenizer import Tokenizer

SCHEMA = 1


@dataclass(frozen=True)
class Question:
    """What is asked of every line: how, and with which adapter where the line names none."""

    sampling: Sampling
    chat: bool
    adapter: str | None
    adapters: tuple[str, ...]

    def ask(self, line: Line, number: int) -> Ask:
        """The line as the engine takes it. Line i draws with seed + i."""
        adapter = line.adapter if "adapter" in line.model_fields_set else self.adapter
        return Ask(line.asked(self.chat), line.sampling(self.sampling, number), adapter)


@dataclass
class _Part:
    """The unfinished file: where each answered line's rows lie in it, and the digest of that line."""

    path: Path
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)


@dataclass
class _Tally:
    """What was made in this run; `errors` and `cut` (ended inside a constraint) of the whole file."""

    tokens: int = 0
    errors: int = 0
    cut: int = 0

    def add(self, row: dict[str, Any]) -> None:
        self.errors += row["finish_reason"] == "error"
        self.cut += row["finish_reason"] != "error" and "error" in row


def answer_file(
    engine: Engine, source: Path, target: Path, question: Question, settings: dict[str, Any]
) -> dict[str, Any]:
    """Answer every line of `source` into `target`; an unfinished run of the same `settings` is taken up."""
    if target.exists():
        raise UserError(f"{target}: exists already; remove it, or choose another place with --out")
    part = _Part(target.with_name(target.name + ".unfinished"))
    busy = f"{part.path}: another process writes it; wait for that one, or choose another --out"
    with storage.locked(target.with_name(target.name + ".lock"), busy), storage.explain_write(part.path):
        head = json.dumps({"settings": settings}, ensure_ascii=False).encode() + b"\n"
        tally = _resume(part, head)
        total = _check(engine, source, question, part)
        if not part.path.exists():
            storage.write_atomic(part.path, head)
        warm(engine)
        done, started = len(part.places), time.monotonic()
        with Progress("generate", total, "prompts", start=done) as bar, _unbroken_steps() as between:
            for row, completions in _answers(engine, source, question, part, between):
                tally.tokens += sum(len(c.token_ids) for c in completions)
                for each in row["rows"]:
                    tally.add(each)
                _append(part, row)
                bar.update(1, **{"tokens/s": tally.tokens / max(time.monotonic() - started, 1e-9)})
        _assemble(part, target)
    seconds = time.monotonic() - started
    speed = round(tally.tokens / seconds, 1) if tally.tokens and seconds else None
    return {
        "schema": SCHEMA, "out": str(target), "prompts": total, "resumed_at": done,
        "errors": tally.errors, "cut": tally.cut, "tokens": tally.tokens, "tokens_per_s": speed,
    }  # fmt: skip


def row_of(answer: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """An answer as JSON; what is not there is left out."""
    row: dict[str, Any] = {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.token_ids),
    }
    if answer.logprobs is not None:
        row["logprobs"] = [
            {"id": known.token_id, "token": tokenizer.decode([known.token_id]), "logprob": known.logprob}
            | ({"top": [list(pair) for pair in known.top]} if known.top else {})
            for known in answer.logprobs
        ]
    return row | ({"error": answer.error} if answer.error else {})


def rows_of(completions: list[Completion], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """All answers to one prompt; of several, each has its index."""
    rows = [row_of(c, tokenizer) for c in completions]
    return rows if len(rows) == 1 else [{"index": i} | row for i, row in enumerate(rows)]


def model_digest(folder: Path) -> str:
    """The hash of all files that the answers depend on: weights, configuration, tokenizer."""
    from microlm.core.manifest import hash_file, sha256
    from microlm.text.tokenizer import FILES

    names = ("config.json", "adapter_config.json", *FILES)
    files = [*folder.glob("*.safetensors"), *(folder / name for name in names)]
    return sha256(json.dumps(sorted([f.name, hash_file(f)] for f in files if f.exists())).encode())


def _answers(
    engine: Engine, source: Path, question: Question, part: _Part, between: Callable[[], None]
) -> Iterator[tuple[dict[str, Any], list[Completion]]]:
    """What is still to be answered, as it is finished: a row of the unfinished file, and the completions."""
    open_lines: dict[int, tuple[int, str, Line]] = {}

    def asks() -> Iterator[Ask]:
        entered = 0
        for number, (_, digest, line) in enumerate(read_prompts(source)):
            if number not in part.places:
                open_lines[entered] = (number, digest, line)
                entered += 1
                yield question.ask(line, number)

    for entered, completions in finished(engine, asks(), between):
        number, digest, line = open_lines.pop(entered)
        rows = [line.keep() | row for row in rows_of(completions, engine.tokenizer)]
        yield {"line": number, "of": digest, "rows": rows}, completions


def _check(engine: Engine, source: Path, question: Question, part: _Part) -> int:
    """How many prompts there are, every one of them checked, and compared with what is answered already."""
    total = 0
    for number, (place, digest, line) in enumerate(read_prompts(source)):
        total += 1
        if part.digests.get(number, digest) != digest:
            raise _other(part)
        try:
            engine.prepare([0], line.sampling(question.sampling, number), live=False)  # but for the prompt
        except UserError as e:
            raise UserError(f"{place}: {e}") from None
        if line.adapter is not None and line.adapter not in question.adapters:
            raise UserError(f"{place}: adapter '{line.adapter}' is not there; give --adapter NAME=DIR")
    if any(number >= total for number in part.digests):
        raise _other(part)
    return total


def _resume(part: _Part, head: bytes) -> _Tally:
    """Find the answers that the unfinished file holds; a line that was cut while being written is removed."""
    tally = _Tally()
    if not part.path.exists():
        return tally
    whole = _whole_bytes(part.path)
    with part.path.open("r+b") as file:
        if file.readline() != head:
            raise _other(part)
        at = len(head)
        while at < whole:
            raw = file.readline()
            try:
                row = json.loads(raw)
                number, part.digests[number] = row["line"], row["of"]
                for each in row["rows"]:
                    tally.add(each)
            except (ValueError, KeyError, TypeError):
                raise _other(part) from None
            part.places[number] = (at, len(raw))
            at += len(raw)
        file.truncate(whole)
    return tally


def _whole_bytes(path: Path) -> int:
    """How many bytes of a file are whole lines."""
    with path.open("rb") as file:
        at = end = file.seek(0, 2)
        while at:
            at = max(0, at - 65536)
            file.seek(at)
            if (found := file.read(min(65536, end - at)).rfind(b"\n")) >= 0:
                return at + found + 1
    return 0


def _append(part: _Part, row: dict[str, Any]) -> None:
    """One write, so that a kill leaves at most one line that is not whole."""
    raw = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    with part.path.open("ab", buffering=0) as file:
        part.places[row["line"]] = (file.tell(), len(raw))
        file.write(raw)


def _assemble(part: _Part, target: Path) -> None:
    """Put the rows in the order of the prompts, and the unfinished file away."""

    def rows() -> Iterator[bytes]:
        with part.path.open("rb") as file:
            for number in sorted(part.places):
                at, size = part.places[number]
                file.seek(at)
                for row in json.loads(file.read(size))["rows"]:
                    yield json.dumps(row, ensure_ascii=False).encode() + b"\n"

    storage.write_atomic(target, rows())
    part.path.unlink()


def _other(part: _Part) -> UserError:
    return UserError(
        f"{part.path}: was begun with other prompts or settings; remove it, or choose another --out"
    )


@contextmanager
def _unbroken_steps() -> Iterator[Callable[[], None]]:
    """The first Ctrl-C waits until the step has ended and its answers are written; a second one does not."""
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()

    def note(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    def between() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    if is_main:
        signal.signal(signal.SIGINT, note)
    try:
        yield between
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


def settings_of(
    engine: Engine, question: Question, arguments: dict[str, Any], places: dict[str, Path]
) -> dict[str, Any]:
    """All that answers depend on, the prompts apart."""
    how = {k: v for k, v in arguments.items() if k not in ("max_seqs", "kv_memory", "threads")}
    return {
        "model": model_digest(engine.directory),
        "adapters": {name: model_digest(place) for name, place in places.items()},
        "adapter": question.adapter,
        "chat": question.chat,
        "window": engine.max_seq_len,
        "engine": how,
        "sampling": asdict(question.sampling),
    }
