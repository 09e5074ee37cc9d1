"""The passes over a corpus, in order. Enters: blocks of raw records. Leaves: `root/kind/split.jsonl`, audit.

refine → exact → near duplicates → repeated lines (then both again) → held-out texts → assemble.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from microlm.core import runtime, storage
from microlm.core.metrics import Progress
from microlm.core.records import Document
from microlm.text.audit import Audit, Survey
from microlm.text.clean import CleanRecipe, Effects, clean, glimpse, rules
from microlm.text.corpus import assemble, contaminate, duplicates, shared
from microlm.text.corpus.assemble import Plan
from microlm.text.corpus.cut import cut
from microlm.text.corpus.pool import Pool
from microlm.text.corpus.refine import Report, Task, document, refine
from microlm.text.corpus.store import (
    DOCUMENTS,
    EXACT,
    KEPT,
    LINES,
    NEAR,
    Entries,
    Reader,
    Store,
    join_digest,
)
from microlm.text.dedup import digest, record_digest
from microlm.text.near.signature import sign
from microlm.text.rules.repetition import repetition
from microlm.text.split import KINDS, Kind

PART_BYTES = 16 << 20
"""Of text in one range of the last pass."""
REASONS = {EXACT: "duplicate", NEAR: "near_duplicate", LINES: "only_repeated_lines"}
MAX_EXAMPLES = 3


def load_kernels() -> None:
    """Load, or compile, the loops that workers run, and their tables."""
    text = "一二三四五六七八九十。" * 3
    document, _ = clean(Document(text), rules(CleanRecipe.model_validate({})), Effects())
    repetition(text)
    record_digest(document)
    sign([text])
    shared.hash_lines(np.zeros(1, dtype=np.uint8), np.array([0]), np.array([1]))
    contaminate.gather([text], [], overlap=1.0)[0].found_in(text)
    Survey().observe("documents", "train", document)


class Engine:
    """One corpus on its way; `folder` outlives a crash, and what is finished in it is not done again."""

    def __init__(self, folder: Path, pool: Pool, audit: Audit) -> None:
        self.blocks, self.parts = folder / "blocks", folder / "parts"
        self.pool, self.audit = pool, audit
        self.store = Store(self.blocks, 0)
        for path in (self.blocks, self.parts):
            with storage.explain_write(path):
                path.mkdir(parents=True, exist_ok=True)

    def refine(self, tasks: Iterable[Task]) -> Iterator[tuple[str, Report]]:
        """Clean all blocks; yields the word of the source and the report of each, in order."""
        words: deque[str] = deque()

        def noted() -> Iterator[Task]:
            for task in tasks:
                words.append(task.word)
                yield task

        for found in self.pool.map(refine, noted()):
            report = Report.from_json(found)
            self.store = Store(self.blocks, self.store.count + 1)
            self.audit.take(report)
            yield words.popleft(), report
        self.store.reset()  # an earlier attempt may have got further

    def numbered(self) -> int:
        """The number of the next block."""
        return self.store.count

    def drop_exact(self) -> None:
        """Of records that say the same keep the best."""
        with Progress("data exact duplicates", None, "records") as bar:
            for kind, block, row in duplicates.exact(self.store):
                self._drop(EXACT, block, row, kind)
                bar.update(1)

    def drop_shared_lines(self, documents: int, min_chars: int) -> bool:
        """Take lines out that at least so many documents hold; whether there were any."""
        lines = shared.find(self.pool, self.store, documents) if documents else np.zeros(0, dtype=np.uint64)
        for block, row in shared.remove(self.pool, self.store, lines, min_chars, self.audit.effects):
            self._drop(LINES, block, row)
        runtime.give_memory_back()
        return len(lines) > 0

    def drop_near(self, threshold: float, memory_mb: int) -> None:
        """Of documents that say nearly the same keep the best."""
        if threshold:
            for block, row in duplicates.near(self.pool, self.store, threshold, memory_mb):
                self._drop(NEAR, block, row)
            runtime.give_memory_back()

    def note_held_out(self, plan: Plan, tests: list[str], said: Iterable[str]) -> None:
        """Write down what no training record may hold.

        By 13-grams: `tests` and held-out documents. Word for word: these, `said` and held-out extraction.
        """
        keys = {digest(text) for text in (*tests, *said)}
        held_out, short = contaminate.gather(tests, self._held_out_documents(plan, keys), plan.overlap)
        contaminate.save(held_out, self.blocks)
        self.audit.held_out = {"texts": len(held_out.sizes), "too_short_for_13_grams": short}
        del held_out
        runtime.give_memory_back()
        path = self.blocks / "held_out.json"
        with storage.explain_write(path):
            path.write_text(json.dumps(sorted(key.hex() for key in keys)), encoding="utf-8")

    def _held_out_documents(self, plan: Plan, keys: set[bytes]) -> Iterator[str]:
        """Held-out documents as they will be cut; what they and held-out extraction say goes into `keys`."""
        with Reader(self.blocks) as reader:
            for number in range(self.store.count):
                for entry in self._held_out(plan, "extraction", number):
                    keys.add(join_digest(entry["hi"], entry["lo"]))
                for entry in self._held_out(plan, "documents", number):
                    for piece in cut(reader.body(number, entry).decode("utf-8"), plan.cut_chars):
                        keys.add(digest(piece))
                        yield piece

    def _held_out(self, plan: Plan, kind: Kind, number: int) -> Entries:
        mine = self._kept(kind, number)
        return mine[assemble.splits(plan, kind, mine) > 0]

    def _kept(self, kind: Kind, number: int) -> Entries:
        entries = self.store.entries(number)
        return entries[(self.store.state(number) == KEPT) & (entries["kind"] == KINDS.index(kind))]

    def plan(self, shares: dict[Kind, tuple[float, float]], overlap: float, cut_chars: int) -> Plan:
        """How the last pass is cut up, and which records fill a split that chance left empty."""
        size = sum(int(self.store.entries(n)["size"].sum()) for n in range(self.store.count))
        pieces = max(2, -(-size // PART_BYTES))
        plan = Plan(self.blocks, self.parts, self.store.count, pieces, shares, overlap, cut_chars, {})
        kinds: tuple[Kind, ...] = ("documents", "conversations", "preferences")
        for kind in kinds:
            for split, share in zip(assemble.NAMES[1:], shares[kind], strict=True):
                if share and (key := self._to_move(plan, kind, assemble.NAMES.index(split))):
                    plan.moved[key] = split
        return plan

    def _to_move(self, plan: Plan, kind: Kind, split: int) -> tuple[Kind, int, int] | None:
        """The training record with the smallest digest, when the split has none and training has two."""
        train = []
        for number in range(self.store.count):
            mine = self._kept(kind, number)
            sides = assemble.splits(plan, kind, mine)
            if (sides == split).any():
                return None
            train += [(int(e["hi"]), int(e["lo"])) for e in mine[sides == 0][:2]]  # they are in order
        return (kind, *min(train)) if len({lo for _, lo in train}) >= 2 else None

    def assemble(self, plan: Plan, root: Path) -> int:
        """Write the files; returns how many training documents say what a held-out one says."""
        assemble.forget()
        train, held_out = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.uint64)]
        with Progress("data writing", plan.pieces, "parts") as bar:
            for outcome in self.pool.map(assemble.assemble, ((plan, i) for i in range(plan.pieces))):
                self.audit.tallies["decontaminate"].add(outcome.contaminated)
                self.audit.survey.add(outcome.survey)
                self.audit.cut += outcome.cut
                self.audit.pieces += outcome.pieces
                for split, digests in outcome.digests.items():
                    (train if split == "train" else held_out).append(np.array(digests, dtype=np.uint64))
                bar.update(1)
        assemble.join(plan, root)
        known = np.concatenate(held_out)
        return sum(int(np.isin(part, known).sum()) for part in train)

    def count_kept(self) -> None:
        """Enter into the audit what the duplicates left."""
        tally = self.audit.tallies["dedup"]
        kept = sum(int((self.store.state(n) == KEPT).sum()) for n in range(self.store.count))
        tally.read += kept
        tally.kept += kept

    def _drop(self, state: int, block: int, row: int, kind: int = DOCUMENTS) -> None:
        tally = self.audit.tallies["dedup"]
        reason = f"{REASONS[state]}_{KINDS[kind]}"
        tally.drop(reason, self._glimpse(block, row) if tally.dropped[reason] < MAX_EXAMPLES else "")

    def _glimpse(self, block: int, row: int) -> str:
        entry = self.store.entries(block)[row]
        with Reader(self.blocks) as reader:
            body, meta = reader.both(block, entry)
        return glimpse(document(body, meta)) if meta else str(json.loads(body).get("source", ""))
