"""Files → token sets: samples of ids in a row, in any number of processes, always the same bytes.

A set is `NAME.tokens.bin`, `NAME.loss.bin` (not of documents), `NAME.ends.bin` (int64); `index.json` lists
them. In a set of preferences sample 2k is the chosen conversation of pair k, sample 2k + 1 the rejected one.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.core.records import Conversation, Document, Extraction, Preference
from microlm.text import sources
from microlm.text.chat import encode_chats
from microlm.text.chat.pairs import encode_pairs
from microlm.text.corpus.pool import open_pool
from microlm.text.corpus.token_sets import CONVERSATIONS, DOCUMENTS, PREFERENCES, Samples, TokenSets
from microlm.text.read import Drop, Fault, builder
from microlm.text.sources import Block, Source, Tally
from microlm.text.sources.jsonl import read_lines
from microlm.text.tokenizer import Tokenizer, copy_files

INDEX = "index.json"
SPLITS = ("train", "validation")
_CHATS = 512  # encoded at once
_PROCESS_BYTES = 16 << 20  # of input that are worth a process

Encodable = Document | Conversation | Preference
Rows = dict[str, list[tuple[list[int], list[int]]]]
"""Ids and mask of samples, by the name of their set."""


@dataclass(frozen=True, slots=True)
class File:
    """One input: a file of a data artifact, which holds one `kind` of records, or a source of a user's."""

    split: str
    place: Path | Source
    kind: type[Encodable] | None = None

    @property
    def size_bytes(self) -> int:
        """The bytes that will be read; 0 where nobody knows."""
        if isinstance(self.place, Path):
            return self.place.stat().st_size
        return self.place.size_bytes() or 0

    def blocks(self) -> Iterator[Block]:
        """The same blocks, whatever the number of processes."""
        if isinstance(self.place, Path):
            return read_lines(self.place, str(self.place)) if self.size_bytes else iter(())
        return sources.blocks(self.place)


@dataclass(frozen=True, slots=True)
class _Task:
    tokenizer: Path
    stamp: tuple[int, int]
    file: File
    block: Block
    number: int  # of the file
    aside: Path | None  # where a worker leaves what it has made: a pipe would keep both processes busy


@dataclass(frozen=True, slots=True)
class _Encoded:
    number: int  # of the file
    sets: dict[str, Samples]
    tally: Tally
    consumed: int


@dataclass(frozen=True, slots=True)
class Found:
    """What became of each user's source, by its word, and under which licences its records are."""

    tallies: dict[str, Tally]
    licences: set[str]


def files_of_data(folder: Path, splits: Sequence[str]) -> list[File]:
    """Documents, conversations and preferences of a data artifact; a corpus may lack a file of them."""
    kinds: dict[str, type[Encodable]] = {
        DOCUMENTS: Document, CONVERSATIONS: Conversation, PREFERENCES: Preference,
    }  # fmt: skip
    places = [
        (split, folder / name / f"{split}.jsonl", kind) for split in splits for name, kind in kinds.items()
    ]
    return [File(split, place, kind) for split, place, kind in places if place.exists()]


def files_of_words(words: Sequence[str]) -> list[File]:
    """The sources that words as in `data.source` name; all they hold is for training."""
    found = [sources.parse(word) for word in words]
    if any(source.kind == sources.FACTBOOK for source in found):
        raise UserError("source 'factbook': has no files; make a data artifact of it first (stage: data)")
    return [File("train", source) for source in found]


def encode_files(words: Sequence[str], tokenizer: Path, out: Path, processes: int = 1) -> dict[str, Any]:
    """Sources as in `data.source`, or the directory of a data artifact → the directory `out`; its index.

    What cannot be used is dropped and counted, on stderr too. `out` appears when it is whole.
    """
    data = [word for word in words if (Path(word) / storage.MANIFEST).is_file()]
    files = [file for word in data for file in files_of_data(Path(word), SPLITS)]
    files += files_of_words([word for word in words if word not in data])
    if not storage.is_free(str(out)) or (out / storage.MANIFEST).exists():
        raise UserError(f"{out}: is in the way; move it away or choose another place")
    place = out.resolve()
    with storage.explain_write(out):
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=place.parent, prefix=f"{place.name}."))
    try:
        with storage.explain_write(out):
            folder.chmod(0o755)
            copy_files(tokenizer, folder / "tokenizer")
            index, _ = write_sets(files, tokenizer, folder, processes)
            (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=1) + "\n", "utf-8")
            folder.replace(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return index


def write_sets(
    files: Sequence[File], directory: Path, folder: Path, processes: int
) -> tuple[dict[str, Any], Found]:
    """Encode files into token sets under `folder`; the index, and what was found in a user's sources."""
    tokenizer = Tokenizer.load(directory)
    total = sum(file.size_bytes for file in files)
    workers = min(processes, 1 + total // _PROCESS_BYTES)
    if workers > 1 and tokenizer.backend == "tokenizers":
        workers = 1  # the library works on all cores by itself
    written = TokenSets(folder, tokenizer.dtype)
    found = Found({}, set())
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="aside-", ignore_cleanup_errors=True) as place,
        open_pool(workers, lambda: _warm(tokenizer)) as pool,
        Progress("tokenize", total or None, "bytes") as bar,
    ):
        for split in (file.split for file in files if file.kind is Document):
            written.open(f"{DOCUMENTS}-{split}")
        tallies, ended = [Tally() for _ in files], 0
        tasks = _tasks(directory, files, Path(place) if workers > 1 else None)
        for encoded in pool.map(_encode_block, tasks):
            for number in range(ended, encoded.number):
                _tell(files[number].place, tallies[number], found)
            ended = encoded.number
            for name, samples in encoded.sets.items():
                written.add(name, samples.loaded())
            tallies[ended].add(encoded.tally)
            bar.update(encoded.consumed, tokens=f"{written.tokens:,}")
        for number in range(ended, len(files)):
            _tell(files[number].place, tallies[number], found)
    return written.index(tokenizer, (file.split for file in files)), found


def _tell(place: Path | Source, tally: Tally, found: Found) -> None:
    """A file is read: refuse a user's source that is of no use, and say what was dropped."""
    word = f"{place.parent.name}/{place.name}" if isinstance(place, Path) else place.word
    if not isinstance(place, Path):
        found.licences.update(tally.licences)
        tally.check()
        sources.require_usable(place, tally)
    elif not tally.dropped:
        return
    found.tallies[word] = tally
    if tally.dropped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in tally.dropped.most_common(5))
        sys.stderr.write(
            f"tokenize {word}: {tally.read - tally.kept} of {tally.read} records dropped ({reasons})\n"
        )


def _tasks(directory: Path, files: Sequence[File], aside: Path | None) -> Iterator[_Task]:
    stat = (directory / "tokenizer.json").stat()
    for number, file in enumerate(files):
        for part, block in enumerate(file.blocks()):
            place = aside and aside / f"{number}.{part}"
            yield _Task(directory, (stat.st_mtime_ns, stat.st_size), file, block, number, place)


def _warm(tokenizer: Tokenizer) -> None:
    """Load what workers need, so that forked ones have it."""
    stat = (tokenizer.path / "tokenizer.json").stat()
    _load(tokenizer.path, (stat.st_mtime_ns, stat.st_size)).start()


@lru_cache(maxsize=2)
def _load(directory: Path, stamp: tuple[int, int]) -> Tokenizer:
    """The tokenizer, loaded once in a process; `stamp` tells a changed file."""
    return Tokenizer.load(directory)


def _encode_block(task: _Task) -> _Encoded:
    """The samples of a block, by the name of their set."""
    tokenizer = _load(task.tokenizer, task.stamp)
    tally, texts = Tally(), []
    chats: list[Conversation] = []
    pairs: list[Preference] = []
    for record in _records(task):
        if isinstance(record, Drop):
            tally.drop(record.reason, f"{record.place}: {record.detail}")
        elif isinstance(record, Preference):
            pairs.append(record)
        else:
            tally.keep(record.licence)
            texts.append(record.text) if isinstance(record, Document) else chats.append(record)
    rows: Rows = {}
    _add_conversations(rows, tokenizer, chats, task.file)
    _add_pairs(rows, tokenizer, pairs, task.file, tally)
    sets = {name: _in_a_row(some, tokenizer.dtype) for name, some in rows.items()}
    if texts:
        ids, ends = tokenizer.encode_arrays(texts, tokenizer.eos_id)
        sets[f"{DOCUMENTS}-{task.file.split}"] = Samples(ids, np.diff(ends, prepend=0), None)
    if task.aside:
        sets = {name: samples.stored(Path(f"{task.aside}.{name}")) for name, samples in sets.items()}
    return _Encoded(task.number, sets, tally, task.block.consumed)


def _records(task: _Task) -> Iterator[Encodable | Drop]:
    if task.file.kind is None:
        for record in sources.read_block(task.block):
            yield _unsuitable(record) if isinstance(record, Extraction) else record
        return
    build = builder(task.file.kind)  # type: ignore[arg-type]
    for place, data in task.block.objects():
        try:
            if isinstance(data, Drop):
                raise Fault(data.reason, data.detail)
            yield build(data)
        except Fault as fault:
            raise UserError(f"{place}: {fault.detail}; make the file again") from None


def _unsuitable(record: Extraction) -> Drop:
    return Drop(
        "extraction_record", record.source, "is no document, conversation or preference; prepare it (data)"
    )


def _add_conversations(rows: Rows, tokenizer: Tokenizer, chats: Sequence[Conversation], file: File) -> None:
    """Ids and masks by task."""
    for start in range(0, len(chats), _CHATS):
        some = chats[start : start + _CHATS]
        for chat, encoded in zip(some, encode_chats(tokenizer, some), strict=True):
            rows.setdefault(_name(CONVERSATIONS, chat.task, file), []).append(encoded)


def _add_pairs(
    rows: Rows, tokenizer: Tokenizer, pairs: Sequence[Preference], file: File, tally: Tally
) -> None:
    """Both sides of each pair by task; where they are the same to this tokenizer, nothing is preferred."""
    for start in range(0, len(pairs), _CHATS):
        some = pairs[start : start + _CHATS]
        for pair, (chosen, rejected) in zip(some, encode_pairs(tokenizer, some), strict=True):
            if chosen == rejected:
                tally.drop("equal_answers", f"{pair.source}: both answers have the same ids")
                continue
            tally.keep(pair.licence)
            rows.setdefault(_name(PREFERENCES, pair.task, file), []).extend((chosen, rejected))


def _in_a_row(rows: list[tuple[list[int], list[int]]], dtype: np.dtype[Any]) -> Samples:
    sizes = np.array([len(ids) for ids, _ in rows], dtype=np.int64)
    ids = np.fromiter(chain.from_iterable(ids for ids, _ in rows), dtype, count=sizes.sum())
    return Samples(ids, sizes, np.frombuffer(b"".join(bytes(mask) for _, mask in rows), dtype=np.uint8))


def _name(kind: str, task: str, file: File) -> str:
    if not sources.is_task(task):
        place = file.place if isinstance(file.place, Path) else file.place.word
        raise UserError(
            f"{place}: task {task[:80]!r} cannot name a token set; use letters, digits, '_', '-', "
            f"at most 64 of them, and not '{DOCUMENTS}'"
        )
    return f"{kind}-{task}-{file.split}"
