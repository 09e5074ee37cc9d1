"""Training byte-pair encoding. Enters: blocks of texts, a plan. Leaves: merges of byte strings, and a report.

exact: from every distinct piece, the merges of `tokenizers`' BpeTrainer. aligned: no token reaches over the
border of a character; pairs of characters are counted first, and pieces are cut where no token can be.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.text.bpe.learn import passes
from microlm.text.bpe.learn.choose import Choice, choose_aligned, choose_exact
from microlm.text.bpe.learn.chunks import Chunks, Columns
from microlm.text.bpe.learn.count import CODE_POINTS, PairCounts
from microlm.text.bpe.learn.initial import Ints
from microlm.text.bpe.learn.merges import learn
from microlm.text.bpe.learn.passes import Block, C, ChunkJob, PairJob, Share, Watch
from microlm.text.bpe.learn.spelling import BYTES, byte_columns, parts_of
from microlm.text.bpe.learn.table import OutOfMemory
from microlm.text.bpe.pieces import Pieces
from microlm.text.compiled import tell_slow
from microlm.text.corpus.pool import Pool, open_pool
from microlm.text.sources import Tally

ALIGNED_BYTES, EXACT_BYTES = 32, 96
"""Memory of training for each character of the distinct chunks."""
_FIRST_GUESS = 0.7  # of the count that the last token had if all were characters and pairs


class TooLittleMemory(UserError):
    """What is to be counted does not fit into the memory that was given."""


@dataclass(frozen=True)
class Plan:
    """What is trained: `room` tokens beside the 256 bytes, each seen `min_frequency` times or more.

    `processes`, `memory_bytes` (of all of them) and `cut`, the first one tried, do not change the result.
    """

    room: int
    pieces: Pieces
    mode: Literal["aligned", "exact"] = "aligned"
    min_frequency: int = 2
    processes: int = 1
    memory_bytes: int = 2 << 30
    cut: int | None = None


@dataclass(frozen=True)
class Report:
    """How it went.

    Each token was seen `last_count` times or more. Pieces were cut only between characters that are
    neighbours fewer than `cut` times (0: not at all); as `cut` ≤ `last_count`, that changes nothing.
    `lost`: so much too low the count of a pair may be, for memory; `cut` is above it.
    """

    mode: str
    processes: int
    texts: int
    bytes: int
    rounds: int
    cut: int
    lost: int
    last_count: int
    chunks: int
    symbols: int
    seconds: dict[str, float]
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Trained:
    """What was learnt; `choice.tokens` follow the 256 bytes, fewer than asked for if there are no more.

    `tally`: the records that the blocks held.
    """

    choice: Choice
    report: Report
    tally: Tally


def train(
    blocks: Iterable[Block], plan: Plan, progress: Watch = Progress, folder: Path | None = None
) -> Trained:
    """Learn merges from the blocks, which are gone through more than once.

    What processes tell each other lies in `folder` meanwhile. Where memory is too little for the shares of
    several processes, one works alone; a UserError if it is too little for that.
    """
    tell_slow("training a tokenizer")
    share = Share.of(plan.memory_bytes, 1 if passes.is_small(blocks) else plan.processes)
    try:
        return _train(blocks, plan, share, progress, folder)
    except TooLittleMemory:
        if share.processes == 1:
            raise
    return _train(blocks, plan, Share.of(plan.memory_bytes, 1), progress, folder)


def _train(
    blocks: Iterable[Block], plan: Plan, share: Share, progress: Watch, folder: Path | None
) -> Trained:
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="counts-") as place,
        open_pool(share.processes, _warm) as pool,
    ):
        run = _Run(plan, share, blocks, pool if share.processes > 1 else None, Path(place), progress)
        try:
            return run.exact() if plan.mode == "exact" else run.aligned()
        except OutOfMemory:
            raise run.memory_error() from None


class _Run:
    """One training: its passes, and what there is to tell of them."""

    def __init__(
        self, plan: Plan, share: Share, blocks: Iterable[Block], pool: Pool | None, folder: Path, watch: Watch
    ) -> None:
        self.plan, self.share, self.blocks, self.pool = plan, share, blocks, pool
        self.folder, self.watch = folder, watch
        self.rule, self.least = plan.pieces.rule(), max(1, plan.min_frequency)
        self.seconds: dict[str, float] = {}
        self._at = time.monotonic()
        self._size: float | None = None
        self.tally = Tally()

    def exact(self) -> Trained:
        """Count whole pieces, merge their bytes."""
        chunks = self._chunks(ChunkJob(self.rule, self.share.table_bytes // EXACT_BYTES))
        columns, texts = byte_columns(chunks.columns()), chunks.texts
        del chunks
        size = int(((np.diff(columns.begins) - 1) * columns.weights).sum())
        told = self._told(columns) | {"texts": texts, "bytes": size, "rounds": 1, "cut": 0, "lost": 0}
        choice = choose_exact(self._learn(columns, len(BYTES), self.least, np.zeros(0, dtype=np.int64)))
        return self._trained(choice, told)

    def aligned(self) -> Trained:
        """Count pairs, then chunks, merge their characters; again with a lower cut if that was too high."""
        pairs = self._pairs()
        told = {"texts": pairs.texts, "bytes": pairs.size_bytes(), "lost": pairs.lost}
        floor = max(self.least, pairs.lost + 1)  # rarer pairs may be missing
        guess = int(pairs.highest(self.plan.room) * _FIRST_GUESS)
        cut, rounds = max(floor, guess if self.plan.cut is None else self.plan.cut), 0
        while True:
            chunks = self._chunks(self._job(pairs, cut))
            columns, reached, rounds = chunks.columns(), chunks.cut, rounds + 1
            del chunks
            told |= self._told(columns) | {"rounds": rounds, "cut": reached}
            parts = parts_of(pairs.characters, max(self.least, reached))
            others = np.array([part.count for part in parts], dtype=np.int64)
            rows = self._learn(columns, CODE_POINTS, reached, others)
            choice = choose_aligned(rows, parts, self.plan.room)
            if len(choice.tokens) == self.plan.room or reached <= self.least:
                return self._trained(choice, told)
            if reached > cut or cut == floor:
                raise self.memory_error()
            cut = max(floor, cut // 2)

    def _job(self, pairs: PairCounts, cut: int) -> ChunkJob:
        """Frequent pairs lie in a file for every process, which has room for chunks beside them."""
        share = self.share.table_bytes
        table = pairs.frequent(cut, share * 3 // 4)
        path = self.folder / "frequent.npy"
        np.save(path, table)
        return ChunkJob(self.rule, (share - table.nbytes) // ALIGNED_BYTES, path, cut)

    def memory_error(self) -> TooLittleMemory:
        """The sentence that says which number to change."""
        megabytes = self.plan.memory_bytes >> 20
        other = "mode to aligned" if self.plan.mode == "exact" else "vocab_size to less"
        return TooLittleMemory(
            f"tokenizer: what is to be counted of this corpus does not fit in memory_mb {megabytes}; "
            f"set memory_mb to {2 * megabytes}, or {other}"
        )

    def _pairs(self) -> PairCounts:
        job = PairJob(self.rule, self.share.table_bytes)
        counter = self._pass("pairs", job, job.counter())
        counter.set_aside(self.folder)
        return counter

    def _chunks(self, job: ChunkJob) -> Chunks:
        return self._pass("chunks", job, job.counter())

    def _pass(self, name: str, job: PairJob | ChunkJob, counter: C) -> C:
        self.tally, self._size = passes.count(
            name, job, counter, self.blocks, self.pool, self.folder, self.watch, self._size
        )
        self._tick(name)
        return counter

    def _learn(self, columns: Columns, base: int, least: int, others: Ints) -> Ints:
        if not self.plan.room:
            return np.zeros((0, 3), dtype=np.int64)
        with self.watch("tokenizer merges", None, "merges") as bar:
            rows = learn(
                columns, base, self.plan.room, least, others, lambda done: bar.update(done - bar.done)
            )
        self._tick("merges")
        return rows

    def _told(self, columns: Columns) -> dict[str, int]:
        many = len(columns.weights)
        return {"chunks": many, "symbols": max(0, len(columns.symbols) - many - 1)}

    def _tick(self, step: str) -> None:
        now = time.monotonic()
        self.seconds[step] = round(self.seconds.get(step, 0.0) + now - self._at, 3)
        self._at = now

    def _trained(self, choice: Choice, told: dict[str, int]) -> Trained:
        return Trained(
            choice,
            Report(
                mode=self.plan.mode,
                processes=self.share.processes,
                last_count=choice.last_count,
                seconds=self.seconds,
                peak_memory_bytes=runtime.peak_rss_bytes(),
                **told,
            ),
            self.tally,
        )


def _warm() -> None:
    """Load the compiled loops, so that forked workers have them."""
    rule, nothing = Pieces().rule(), np.zeros(0, dtype=np.int64)
    pairs = PairCounts(rule, 0)
    pairs.add(["ab"])
    chunks = Chunks(rule, pairs.frequent(1, 1 << 20), 1, 1 << 8)
    chunks.add(["ab"])
    learn(chunks.columns(), CODE_POINTS, 1, 1, nothing, lambda _: None)
