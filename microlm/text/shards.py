"""Stage `tokenize`: prepared records, or raw files → token sets; and their reader.

A set is ids in a row (uint16, uint32 for large vocabularies), a loss mask (documents: none), ends of samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from microlm.core.artifact import Workspace, stage
from microlm.core.errors import UserError
from microlm.core.recipe import StageRecipe, artifact_input, unkeyed
from microlm.text import sources
from microlm.text.corpus.token_sets import CONVERSATIONS, DOCUMENTS, PREFERENCES
from microlm.text.encoding import INDEX, SPLITS, files_of_data, files_of_words, write_sets
from microlm.text.tokenizer import copy_files


class TokenizeRecipe(StageRecipe):
    """Turn every split of a data artifact, or raw files, into token sets."""

    data: str | None = artifact_input(None, kinds=("data",), description="data artifact")
    source: str | list[str] | None = unkeyed(
        None, description="in place of data: raw files as in the stage data, encoded as they are"
    )
    tokenizer: str = artifact_input(
        kinds=("tokenizer", "model"), description="tokenizer artifact, or a model's tokenizer"
    )
    splits: tuple[str, ...] = Field(SPLITS, description="splits of the data artifact to tokenize")

    def words(self) -> list[str]:
        """The sources, none if there is a data artifact."""
        return [self.source] if isinstance(self.source, str) else self.source or []


@dataclass(frozen=True)
class TokenSet:
    """Samples of ids in a row: `tokens` [N], `loss` [N] of 0/1 or None (all), `ends` [samples], exclusive."""

    name: str
    tokens: NDArray[np.integer[Any]]
    loss: NDArray[np.uint8] | None
    ends: NDArray[np.int64]


def fingerprint(recipe: TokenizeRecipe) -> Mapping[str, Any]:
    """The bytes of the user's files that the result depends on."""
    words = [sources.parse(word) for word in recipe.words()]
    return {"sources": [[word.kind, word.fingerprint()] for word in words]} if words else {}


@stage("tokenize", "shards", version=2, fingerprint=fingerprint)
def run(recipe: TokenizeRecipe, work: Workspace) -> None:
    """Encode documents (EOS after each), conversations and preferences (with loss mask), a set each task."""
    if bool(recipe.words()) == bool(recipe.data):
        raise UserError("tokenize: takes either data (an artifact) or source (raw files); give one of them")
    directory = work.inputs["tokenizer"].path
    copy_files(directory, work.path / "tokenizer")
    if recipe.words():
        files = files_of_words(recipe.words())
    else:
        files = files_of_data(work.inputs["data"].path, recipe.splits)
    work.processes = recipe.parallel.processes
    index, found = write_sets(files, directory, work.path, recipe.parallel.processes)
    work.write_json(INDEX, index)
    work.licences |= found.licences
    if found.tallies:
        tallies = {word: tally.to_json() for word, tally in found.tallies.items()}
        work.write_json("logs/sources.json", tallies)
    work.metrics["tokens"] = sum(s["tokens"] for s in index["sets"].values())


def open_sets(path: Path, prefix: str, split: str) -> dict[str, TokenSet]:
    """The token sets of a shards directory whose name starts with `prefix`, by task (or `documents`).

    An empty prefix takes documents and conversations; preferences are asked for as `preferences-`.
    """
    index = json.loads((path / INDEX).read_bytes())
    kinds = (prefix,) if prefix else (DOCUMENTS, CONVERSATIONS)
    wanted = [n for n in index["sets"] if n.startswith(kinds) and n.endswith("-" + split)]
    return {task_of(n): _open(path, n, index["dtype"]) for n in wanted}


def task_of(name: str) -> str:
    """The task of a token set's name, `documents` for theirs: `conversations-a-b-train` is of task `a-b`."""
    task = name.rpartition("-")[0]
    return task.removeprefix(f"{CONVERSATIONS}-" if task.startswith(CONVERSATIONS) else f"{PREFERENCES}-")


def _open(path: Path, name: str, dtype: str) -> TokenSet:
    def column(suffix: str, kind: str) -> NDArray[Any]:
        file = path / f"{name}.{suffix}.bin"
        return np.memmap(file, dtype=kind, mode="r") if file.stat().st_size else np.zeros(0, dtype=kind)

    loss = column("loss", "u1") if (path / f"{name}.loss.bin").exists() else None
    return TokenSet(name, column("tokens", dtype), loss, column("ends", "<i8"))
