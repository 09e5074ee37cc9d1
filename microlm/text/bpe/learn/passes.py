"""A pass over a corpus, in one process or several. Enters: blocks, a job. Leaves: its counter, filled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.text.bpe.learn.chunks import Chunks
from microlm.text.bpe.learn.count import PairCounts
from microlm.text.bpe.pieces import Rule
from microlm.text.corpus.pool import Pool
from microlm.text.sources import Tally

SMALL_BYTES = 64 << 20
"""A corpus up to this is counted by one process: others would not pay."""
GROUP_BYTES, GROUP_HELD = 96 << 20, 16 << 20
"""Blocks that are counted at once: their bytes, and what of them may be in memory."""
PROCESS_BYTES = 224 << 20
"""Memory of a process without tables: Python, compiled code, some texts."""
LEAST_TABLE = 32 << 20
"""Less than this is not worth a start."""

Watch = Callable[[str, float | None, str], Progress]
C = TypeVar("C", PairCounts, Chunks)


class Block(Protocol):
    """A part of a corpus that can be read again and again, in any process."""

    @property
    def size(self) -> int:
        """Bytes of the source that it stands for."""
        ...

    @property
    def held(self) -> int:
        """Bytes of memory that it takes before it is read."""
        ...

    def texts(self, tally: Tally) -> Iterator[list[str]]:
        """The texts, about a megabyte at a time; records are counted in `tally`."""
        ...


@dataclass(frozen=True)
class PairJob:
    """Counting characters and pairs."""

    rule: Rule
    memory_bytes: int

    def counter(self) -> PairCounts:
        """Nothing counted yet."""
        return PairCounts(self.rule, self.memory_bytes)


@dataclass(frozen=True)
class ChunkJob:
    """Counting chunks, cut where pairs are rare; whole pieces without `frequent`, the file of their table."""

    rule: Rule
    symbols: int
    frequent: Path | None = None
    cut: int = 0

    def counter(self) -> Chunks:
        """Nothing counted yet."""
        return Chunks(self.rule, np.load(self.frequent) if self.frequent else None, self.cut, self.symbols)


@dataclass(frozen=True)
class _Task:
    job: PairJob | ChunkJob
    blocks: tuple[Block, ...]
    folder: Path


@dataclass(frozen=True)
class Share:
    """What each of `processes` workers, and the one that adds up, may use for tables."""

    processes: int
    table_bytes: int

    @classmethod
    def of(cls, memory_bytes: int, processes: int) -> Share:
        """As many processes as the memory of all together allows; a UserError if it is too little for one."""
        for count in range(processes, 0, -1):
            share = memory_bytes // (count + 1 if count > 1 else 1) - PROCESS_BYTES
            if share >= LEAST_TABLE:
                return cls(count, share)
        least = (PROCESS_BYTES + LEAST_TABLE) >> 20
        raise UserError(
            f"tokenizer: memory_mb {memory_bytes >> 20} is too little to train in; set it to {least} or more"
        )


def is_small(blocks: Iterable[Block]) -> bool:
    """Whether one process is enough."""
    size = 0
    for block in blocks:
        size += block.size
        if size > SMALL_BYTES:
            return False
    return True


def count(
    name: str, job: PairJob | ChunkJob, counter: C, blocks: Iterable[Block], pool: Pool | None, folder: Path,
    watch: Watch, total: float | None,
) -> tuple[Tally, float]:  # fmt: skip
    """Fill the job's counter from all blocks; returns how many records they hold, and their size."""
    tally = Tally()
    with watch(f"tokenizer {name}", total, "bytes") as bar:
        if pool is None:
            for block in blocks:
                for texts in block.texts(tally):
                    counter.add(texts)
                bar.update(block.size)
        else:
            for place, some, size in pool.map(_count, _tasks(job, blocks, folder)):
                counter.take(place)
                shutil.rmtree(place)
                tally.add(some)
                bar.update(size)
        return tally, bar.done


def _count(task: _Task) -> tuple[Path, Tally, int]:
    counter, tally = task.job.counter(), Tally()
    for block in task.blocks:
        for texts in block.texts(tally):
            counter.add(texts)
    task.folder.mkdir()
    counter.save(task.folder)
    return task.folder, tally, sum(block.size for block in task.blocks)


def _tasks(job: PairJob | ChunkJob, blocks: Iterable[Block], folder: Path) -> Iterator[_Task]:
    group: list[Block] = []
    number = 0
    for block in blocks:
        group.append(block)
        if sum(b.size for b in group) >= GROUP_BYTES or sum(b.held for b in group) >= GROUP_HELD:
            yield _Task(job, tuple(group), folder / str(number))
            group, number = [], number + 1
    if group:
        yield _Task(job, tuple(group), folder / str(number))
