"""The passes over a corpus, in order. Enters: blocks of raw records. Leaves: `root/kind/split.jsonl`, audit.

refine → exact duplicates → repeated lines → near duplicates → held-out texts → assemble.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from microlm.core import storage
from microlm.core.metrics import Progress
from microlm.text.audit import Audit
from microlm.text.clean import glimpse
from microlm.text.corpus import assemble, contaminate, duplicates, shared
from microlm.text.corpus.assemble import Plan
from microlm.text.corpus.pool import Pool
from microlm.text.corpus.refine import Report, Task, document, refine
from microlm.text.corpus.store import CONTAMINATED, EXACT, KEPT, LINES, NEAR, Reader, Store, join_digest
from microlm.text.dedup import DigestSet, digest
from microlm.text.split import KINDS

PART_BYTES = 16 << 20
"""Of text in one range of the last pass."""
REASONS = {EXACT: "duplicate", NEAR: "near_duplicate", LINES: "only_repeated_lines", CONTAMINATED: "held_out"}
MAX_EXAMPLES = 3
DOCUMENTS = KINDS.index("documents")


class Engine:
    """One corpus on its way; `folder` outlives a crash, and what is finished in it is not done again."""

    def __init__(self, folder: Path, pool: Pool, audit: Audit) -> None:
        self.blocks, self.parts = folder / "blocks", folder / "parts"
        self.pool, self.audit = pool, audit
        self.store = Store(self.blocks, 0)
        for path in (self.blocks, self.parts):
            with storage.explain_write(path):
                path.mkdir(parents=True, exist_ok=True)

    def refine(self, tasks: Iterable[Task]) -> Report:
        """Clean all blocks; the sum of their reports."""
        total = Report()
        for found in self.pool.map(refine, tasks):
            total.add(Report.from_json(found))
            self.store = Store(self.blocks, self.store.count + 1)
        self.store.reset()  # an earlier attempt may have got further
        self.audit.take(total)
        return total

    def numbered(self) -> int:
        """The number of the next block."""
        return self.store.count

    def drop_exact(self) -> None:
        """Of records that say the same keep the best."""
        with Progress("data exact duplicates", None, "records") as bar:
            for kind, block, row in duplicates.exact(self.store):
                self._drop(EXACT, block, row, kind)
                bar.update(1)

    def drop_shared_lines(self, documents: int, min_chars: int) -> None:
        """Take lines out that at least so many documents hold; a document can end with them."""
        if documents:
            lines = shared.find(self.pool, self.store, documents)
            for block, row in shared.remove(self.pool, self.store, lines, min_chars, self.audit.effects):
                self._drop(LINES, block, row)
            self.drop_exact()  # what is left of two documents can be the same

    def drop_near(self, threshold: float, memory_mb: int) -> None:
        """Of documents that say nearly the same keep the best."""
        if threshold:
            for block, row in duplicates.near(self.pool, self.store, threshold, memory_mb):
                self._drop(NEAR, block, row)

    def note_held_out(self, plan: Plan, texts: Iterable[str], said: Iterable[str]) -> None:
        """Write down what no training record may hold: `texts` by 13-grams, `said` word for word."""
        keys = {digest(text) for text in said}
        held_out, short = contaminate.gather([*texts, *self._held_out_documents(plan, keys)], plan.overlap)
        contaminate.save(held_out, self.blocks)
        self.audit.held_out = {"texts": len(held_out.sizes), "too_short_for_13_grams": short}
        path = self.blocks / "held_out.json"
        with storage.explain_write(path):
            path.write_text(json.dumps(sorted(key.hex() for key in keys)), encoding="utf-8")

    def _held_out_documents(self, plan: Plan, keys: set[bytes]) -> Iterator[str]:
        """The texts of held-out documents; what held-out extraction says goes into `keys`."""
        with Reader(self.blocks) as reader:
            for number in range(self.store.count):
                entries, state = self.store.entries(number), self.store.state(number)
                for entry in entries[state == KEPT]:
                    kind = KINDS[entry["kind"]]
                    if (
                        kind not in ("documents", "extraction")
                        or assemble.split_for(plan, kind, entry) == "train"
                    ):
                        continue
                    if kind == "documents":
                        yield reader.body(number, entry).decode("utf-8")
                    else:
                        keys.add(join_digest(entry["hi"], entry["lo"]))

    def plan(self, shares: dict[Any, tuple[float, float]], overlap: float, cut_chars: int) -> Plan:
        """How the last pass is cut up."""
        size = sum(int(self.store.entries(n)["size"].sum()) for n in range(self.store.count))
        pieces = max(2, -(-size // PART_BYTES))
        return Plan(self.blocks, self.parts, self.store.count, pieces, shares, overlap, cut_chars)

    def assemble(self, plan: Plan, root: Path) -> None:
        """Write the files."""
        with Progress("data writing", plan.pieces, "parts") as bar:
            for outcome in self.pool.map(assemble.assemble, ((plan, i) for i in range(plan.pieces))):
                self.audit.tallies["decontaminate"].add(outcome.contaminated)
                self.audit.survey.add(outcome.survey)
                self.audit.cut += outcome.cut
                self.audit.pieces += outcome.pieces
                bar.update(1)
        assemble.join(plan, root)

    def leaks(self, plan: Plan, held_out: DigestSet) -> int:
        """Training documents whose digest is held out."""
        found = 0
        for number in range(self.store.count):
            entries, state = self.store.entries(number), self.store.state(number)
            for entry in entries[(state == KEPT) & (entries["kind"] == DOCUMENTS)]:
                if assemble.split_for(plan, "documents", entry) == "train":
                    found += join_digest(entry["hi"], entry["lo"]) in held_out
        return found

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
