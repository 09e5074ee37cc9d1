"""Stage `tokenize`: prepared records → token sets (uint16/uint32 ids, loss mask, sample ends) as flat files.

A set is `NAME.tokens.bin`, `NAME.loss.bin` (conversations), `NAME.ends.bin` (int64); `index.json` lists them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from microlm.core import storage
from microlm.core.artifact import Workspace, stage
from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.core.recipe import StageRecipe, artifact_input
from microlm.core.records import Conversation, Document
from microlm.text.chat import encode_chats
from microlm.text.read import read_records
from microlm.text.tokenizer import Tokenizer, copy_files

SCHEMA = 1
CHUNK = 512
DOCUMENTS = "documents"
_TASK = re.compile(r"[\w-]{1,64}")
T = TypeVar("T")
Sample = tuple[list[int], list[int] | None]


class TokenizeRecipe(StageRecipe):
    """Turn every split of a data artifact into token sets."""

    data: str = artifact_input(kinds=("data",), description="data artifact")
    tokenizer: str = artifact_input(
        kinds=("tokenizer", "model"), description="tokenizer artifact, or a model's tokenizer"
    )
    splits: tuple[str, ...] = Field(("train", "validation"), description="splits to tokenize")


@dataclass(frozen=True)
class TokenSet:
    """Samples of ids in a row: `tokens` [N], `loss` [N] of 0/1 or None (all), `ends` [samples], exclusive."""

    name: str
    tokens: NDArray[np.integer[Any]]
    loss: NDArray[np.uint8] | None
    ends: NDArray[np.int64]


@stage("tokenize", "shards", version=1)
def run(recipe: TokenizeRecipe, work: Workspace) -> None:
    """Encode documents (EOS after each) and conversations (with loss mask), one set for each task."""
    data = work.inputs["data"]
    tokenizer = Tokenizer.load(work.inputs["tokenizer"].path)
    copy_files(work.inputs["tokenizer"].path, work.path / "tokenizer")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 0xFFFF else "<u4")
    sets: dict[str, dict[str, int]] = {}
    for split in recipe.splits:
        documents = data.path / DOCUMENTS / f"{split}.jsonl"
        if documents.exists():
            samples = _documents(tokenizer, read_records(documents, Document))
            name = f"{DOCUMENTS}-{split}"
            sets[name] = _write(work.path, name, samples, dtype)
        conversations = data.path / "conversations" / f"{split}.jsonl"
        if conversations.exists():
            for name, chats in _by_task(conversations, split).items():
                sets[name] = _write(work.path, name, _conversations(tokenizer, chats), dtype)
    work.write_json(
        "index.json",
        {
            "schema": SCHEMA,
            "dtype": dtype.str,
            "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
            "sets": sets,
        },
    )
    work.metrics["tokens"] = sum(s["tokens"] for s in sets.values())


def open_sets(path: Path, prefix: str, split: str) -> dict[str, TokenSet]:
    """The token sets of a shards directory whose name starts with `prefix`, by task (or `documents`)."""
    index = json.loads((path / "index.json").read_bytes())
    wanted = [n for n in index["sets"] if n.startswith(prefix) and n.endswith("-" + split)]
    task = {n: n.removesuffix("-" + split).removeprefix("conversations-") for n in wanted}
    return {task[n]: _open(path, n, index["dtype"]) for n in wanted}


def _open(path: Path, name: str, dtype: str) -> TokenSet:
    def column(suffix: str, kind: str) -> NDArray[Any]:
        file = path / f"{name}.{suffix}.bin"
        return np.memmap(file, dtype=kind, mode="r") if file.stat().st_size else np.zeros(0, dtype=kind)

    loss = column("loss", "u1") if (path / f"{name}.loss.bin").exists() else None
    return TokenSet(name, column("tokens", dtype), loss, column("ends", "<i8"))


def _by_task(path: Path, split: str) -> dict[str, list[Conversation]]:
    groups: dict[str, list[Conversation]] = {}
    for chat in read_records(path, Conversation):
        if not _TASK.fullmatch(chat.task) or chat.task == DOCUMENTS:  # it becomes a file's name
            raise UserError(
                f"{path}: task {chat.task[:80]!r} cannot name a token set; use letters, digits, '_', '-', "
                f"at most 64 of them, and not '{DOCUMENTS}'"
            )
        groups.setdefault(f"conversations-{chat.task}-{split}", []).append(chat)
    return dict(sorted(groups.items()))


def _documents(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[Sample]:
    for chunk in _chunks(documents):
        for ids in tokenizer.encode_batch([d.text for d in chunk]):
            yield [*ids, tokenizer.eos_id], None


def _conversations(tokenizer: Tokenizer, chats: Iterable[Conversation]) -> Iterator[Sample]:
    for chunk in _chunks(chats):
        yield from encode_chats(tokenizer, chunk)


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk


def _write(folder: Path, name: str, samples: Iterator[Sample], dtype: np.dtype[Any]) -> dict[str, int]:
    """Stream samples into the set's files; returns its counts."""
    counts = {"samples": 0, "tokens": 0, "labels": 0}
    ends: list[int] = []
    with storage.explain_write(folder), (folder / f"{name}.tokens.bin").open("wb") as tokens:
        loss_file = folder / f"{name}.loss.bin"
        masks: list[bytes] = []
        with Progress(f"tokenize {name}", None, "samples") as bar:
            for ids, mask in samples:
                tokens.write(np.asarray(ids, dtype=dtype).tobytes())
                counts["samples"] += 1
                counts["tokens"] += len(ids)
                counts["labels"] += sum(mask) if mask is not None else len(ids)
                ends.append(counts["tokens"])
                if mask is not None:
                    masks.append(bytes(mask))
                bar.update(1)
        if masks:
            loss_file.write_bytes(b"".join(masks))
        (folder / f"{name}.ends.bin").write_bytes(np.asarray(ends, dtype="<i8").tobytes())
    return counts
