"""Last pass, one range of digests a time: what was kept → lines of the files of its kind and split.

The order of the output is that of the digests, whatever the order of the input and the number of workers.
"""

from __future__ import annotations

import functools
import json
import shutil
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microlm.core import storage
from microlm.core.records import Document
from microlm.text.audit import Survey
from microlm.text.corpus import contaminate
from microlm.text.corpus.cut import cut
from microlm.text.corpus.refine import document
from microlm.text.corpus.store import Entries, Reader, Store, join_digest
from microlm.text.dedup import digest
from microlm.text.read import Record, builder, parse_json, texts_of
from microlm.text.sources import Tally
from microlm.text.split import KINDS, SPLITS, TYPES, Kind, Split, line_of

NAMES: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Plan:
    """What the pass needs to know, the same for every range."""

    blocks: Path
    parts: Path
    count: int
    pieces: int
    shares: dict[Kind, tuple[float, float]]
    """kind → (validation, test); what the factbook composed is only trained on."""
    overlap: float
    cut_chars: int
    moved: dict[tuple[Kind, int, int], Split]
    """(kind, digest) of the records that fill a split which chance left empty."""


@dataclass
class Outcome:
    """What a range came to."""

    contaminated: Tally = field(default_factory=Tally)
    survey: Survey = field(default_factory=Survey)
    cut: int = 0
    pieces: int = 0
    digests: dict[Split, array[int]] = field(default_factory=lambda: {split: array("Q") for split in NAMES})
    """The first halves of the digests of the documents written."""


def assemble(task: tuple[Plan, int]) -> Outcome:
    """Write the parts of one range of digests."""
    plan, piece = task
    store, outcome = Store(plan.blocks, plan.count), Outcome()
    blocks, _, entries = store.kept(piece, plan.pieces)
    order = np.lexsort((entries["lo"], entries["hi"], entries["kind"]))
    with ExitStack() as stack, storage.explain_write(plan.parts):
        stored = stack.enter_context(Reader(plan.blocks)).all(blocks, entries)
        files: dict[tuple[Kind, Split], Any] = {}
        sides = np.zeros(len(entries), dtype=np.int64)
        for number, name in enumerate(KINDS):
            mine = entries["kind"] == number
            sides[mine] = splits(plan, name, entries[mine])
        for at in order:
            kind, split = KINDS[entries["kind"][at]], NAMES[sides[at]]
            key = join_digest(entries["hi"][at], entries["lo"][at])
            for line, record in _lines(plan, outcome, (kind, split), key, stored[at]):
                if (kind, split) not in files:
                    files[kind, split] = stack.enter_context(part(plan.parts, piece, kind, split).open("wb"))
                files[kind, split].write(line.encode("utf-8"))
                outcome.survey.observe(kind, split, record)
    return outcome


def splits(plan: Plan, kind: Kind, entries: Entries) -> NDArray[np.int64]:
    """The number in NAMES of each record's split, from its digest."""
    point = (entries["lo"] >> np.uint64(32)) / 2.0**32
    validation, test = plan.shares[kind]
    found = np.where(point < validation, 1, np.where(point < validation + test, 2, 0))
    if kind == "extraction":
        found[entries["composed"] == 1] = 0
    for (mine, hi, lo), split in plan.moved.items():
        if mine == kind:
            same = entries["lo"] == np.uint64(lo)  # of preferences: the prompt is the same
            same &= (entries["hi"] == np.uint64(hi)) | (kind == "preferences")
            found[same] = NAMES.index(split)
    return found


def part(folder: Path, piece: int, kind: Kind, split: Split) -> Path:
    """Where a range's records of a kind and split lie until they are joined."""
    return folder / f"{kind}-{split}-{piece:05d}.jsonl"


def join(plan: Plan, root: Path) -> None:
    """The parts of all ranges, one behind the other, as `root/kind/split.jsonl`."""
    for kind, splits in SPLITS.items():
        for split in splits:
            target = root / kind / f"{split}.jsonl"
            with storage.explain_write(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    for piece in range(plan.pieces):
                        path = part(plan.parts, piece, kind, split)
                        if path.exists():
                            with path.open("rb") as made:
                                shutil.copyfileobj(made, out, 1 << 20)
                            path.unlink()


def _lines(
    plan: Plan, outcome: Outcome, place: tuple[Kind, Split], key: bytes, stored: tuple[bytes, bytes]
) -> Iterator[tuple[str, Any]]:
    """The record's lines (several for a long document), none when it is contaminated."""
    (kind, split), (body, meta) = place, stored
    found: Any = document(body, meta) if kind == "documents" else _reader(kind)(parse_json(body))
    if split == "train" and (reason := _contamination(plan, kind, key, found)):
        outcome.contaminated.drop(reason, found.source)
        return
    outcome.contaminated.keep()
    if kind != "documents":
        yield body.decode("utf-8"), found
        return
    pieces = cut(found.text, plan.cut_chars)
    if len(pieces) > 1:
        outcome.cut += 1
        outcome.pieces += len(pieces)
    for number, text in enumerate(pieces, 1):
        source = f"{found.source}#{number}" if len(pieces) > 1 else found.source
        said = digest(text) if len(pieces) > 1 else key
        if split == "train" and len(pieces) > 1 and said in _held_out_said(plan.blocks):
            outcome.contaminated.drop("held_out_piece", source)
            continue
        outcome.digests[split].append(int.from_bytes(said[:8], "big"))
        shorter: Document = replace(found, text=text, source=source)
        yield line_of(shorter), shorter


def _contamination(plan: Plan, kind: Kind, key: bytes, record: Record) -> str | None:
    """Why a training record must go: it says, or holds, what is held out."""
    said, texts = _held_out_said(plan.blocks), texts_of(record)
    keys = [key, *(digest(text) for text in texts)] if said and kind != "documents" else [key]
    if any(one in said for one in keys):
        return f"held_out_{kind}"
    held_out = _held_out_texts(plan.blocks, plan.overlap)
    if kind != "documents" and not held_out.tests:
        return None
    for text in texts:
        if (item := held_out.found_in(text)) is not None and (kind == "documents" or item < held_out.tests):
            return "held_out_text"
    return None


def forget() -> None:
    """Read what is held out anew: another run in this process may have had the same folder."""
    _held_out_texts.cache_clear()
    _held_out_said.cache_clear()


def _reader(kind: Kind) -> Callable[[Any], Any]:
    cls: Any = TYPES[kind]
    found: Callable[[Any], Any] = builder(cls)
    return found


@functools.lru_cache(maxsize=1)
def _held_out_texts(folder: Path, overlap: float) -> contaminate.HeldOut:
    return contaminate.load(folder, overlap)


@functools.lru_cache(maxsize=1)
def _held_out_said(folder: Path) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(key) for key in json.loads((folder / "held_out.json").read_bytes()))
