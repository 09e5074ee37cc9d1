"""What happened to a corpus, in numbers. Enters: tallies of each step and the records that were kept.

Leaves: `logs/audit.json` and `logs/audit.html` (kept and dropped with reasons, lengths, leakage, licences).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from microlm.core.artifact import Artifact
from microlm.core.records import Conversation, Document
from microlm.core.report import Page
from microlm.text.clean import Effects
from microlm.text.compiled import njit
from microlm.text.read import Record
from microlm.text.rules.profile import code_points
from microlm.text.sources import Tally

if TYPE_CHECKING:
    from microlm.text.corpus.refine import Report

SCHEMA = 1
STEPS = ("read", "clean", "dedup", "decontaminate")
SAMPLE_CHARS = 1000  # of each document, for its script
MAX_NAMES = 200
SCRIPTS = ("han", "latin", "other")
_END_OF_NAME = re.compile("[:#]")


@dataclass
class Survey:
    """What lies in the written files; surveys of parts add up."""

    written: dict[str, Counter[str]] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    chars: int = 0

    def observe(self, kind: str, split: str, record: Record) -> None:
        """Count a record that was written."""
        self.written.setdefault(kind, Counter())[split] += 1
        _count(self.sources, _END_OF_NAME.split(record.source, maxsplit=1)[0] or "unknown")
        _count(self.licences, record.licence or "unknown")
        if isinstance(record, Document):
            self.lengths[len(record.text).bit_length()] += 1
            self.chars += len(record.text)
            sample = code_points(record.text)[:SAMPLE_CHARS]
            for script, count in zip(SCRIPTS, _count_scripts(sample).tolist(), strict=True):
                self.scripts[script] += count

    def add(self, other: Survey) -> None:
        """Put the survey of another part to this."""
        for kind, counts in other.written.items():
            self.written.setdefault(kind, Counter()).update(counts)
        self.lengths += other.lengths
        self.scripts.update(other.scripts)
        for mine, theirs in ((self.sources, other.sources), (self.licences, other.licences)):
            for name, count in theirs.items():
                _count(mine, name, count)
        self.chars += other.chars

    def total(self) -> int:
        """The records of all kinds and splits."""
        return sum(counts.total() for counts in self.written.values())


@dataclass
class Audit:
    """What each step did, and what was written in the end; `to_json` is the audit."""

    tallies: dict[str, Tally] = field(default_factory=lambda: {step: Tally() for step in STEPS})
    effects: Effects = field(default_factory=Effects)
    survey: Survey = field(default_factory=Survey)
    leakage: dict[str, int] = field(default_factory=dict)
    held_out: dict[str, int] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    cut: int = 0
    pieces: int = 0

    def take(self, report: Report) -> None:
        """Enter what the first pass counted."""
        self.tallies["read"].add(report.read)
        self.tallies["clean"].add(report.clean)
        self.effects.add(report.effects)

    def take_taught(self, conversations: Iterable[Conversation]) -> None:
        """Enter conversations that were made of other records."""
        for conversation in conversations:
            self.tallies["read"].keep()
            self.survey.observe("conversations", "train", conversation)

    def check(self) -> None:
        """Our own invariants: every record read is written or dropped with a reason."""
        for tally in self.tallies.values():
            tally.check()
        first = self.tallies["read"]
        dropped = sum(tally.dropped.total() for tally in self.tallies.values())
        assert first.read + self.pieces - self.cut == dropped + self.survey.total(), (
            "accepted + dropped = read"
        )

    def warnings(self) -> list[str]:
        """Sentences about what a person should look at."""
        found = [
            f"{count} records lack a key that others have: {reason}; rename it"
            for reason, count in self.tallies["read"].dropped.most_common()
            if reason.startswith("missing_field")
        ]
        found += [f"{n} training {kind} are also held out" for kind, n in self.leakage.items() if n]
        if unknown := self.survey.licences["unknown"]:
            found.append(f"{unknown} records state no licence; add a 'licence' key")
        return found

    def to_json(self) -> dict[str, Any]:
        """The audit as plain values, stable for equal corpora."""
        found = self.survey
        return {
            "schema_version": SCHEMA,
            "steps": {step: _tally_json(tally) for step, tally in self.tallies.items()},
            "edits": self.effects.to_json(),
            "written": {kind: dict(counts) for kind, counts in found.written.items()},
            "cut": {"documents": self.cut, "pieces": self.pieces},
            "document_chars": found.chars,
            "length_histogram": [
                {"below_chars": 1 << b, "documents": found.lengths[b]} for b in sorted(found.lengths)
            ],
            "scripts": dict(found.scripts),
            "leakage": self.leakage,
            "held_out": self.held_out,
            "sources": dict(found.sources.most_common()),
            "licences": dict(found.licences.most_common()),
            "from_factbook": self.filled,
            "warnings": self.warnings(),
        }


@njit
def _count_scripts(points: NDArray[np.uint32]) -> NDArray[np.int64]:
    """How many of the characters are Han, Latin and other."""
    counts = np.zeros(3, dtype=np.int64)
    for point in points:
        if 0x4E00 <= point <= 0x9FFF or 0x3400 <= point <= 0x4DBF or 0x20000 <= point <= 0x323AF:
            counts[0] += 1
        elif 0x61 <= point <= 0x7A or 0x41 <= point <= 0x5A or 0xC0 <= point <= 0x24F:
            counts[1] += 1
        else:
            counts[2] += 1
    return counts


def _count(counter: Counter[str], name: str, count: int = 1) -> None:
    counter[name if name in counter or len(counter) < MAX_NAMES else "other"] += count


def _tally_json(tally: Tally) -> dict[str, Any]:
    reasons = [
        {"reason": reason, "records": count, "examples": tally.examples[reason]}
        for reason, count in tally.dropped.most_common()
    ]
    return {"read": tally.read, "kept": tally.kept, "dropped": tally.dropped.total(), "reasons": reasons}


def summary(artifact: Artifact) -> dict[str, Any]:
    """The audit of a data artifact."""
    audit: dict[str, Any] = artifact.json("logs/audit.json")
    return audit


def summary_rows(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The audit as (name, value) rows for a terminal."""
    rows = []
    for step, tally in audit["steps"].items():
        rows.append((step, f"{tally['read']:,} read, {tally['kept']:,} kept, {tally['dropped']:,} dropped"))
        rows += [(f"  {r['reason']}", f"{r['records']:,}, first {_first(r)}") for r in tally["reasons"]]
    rows += [(f"edited: {rule}", f"{e['documents']:,} documents") for rule, e in audit["edits"].items()]
    for kind, counts in audit["written"].items():
        rows.append((f"written: {kind}", ", ".join(f"{split} {n:,}" for split, n in counts.items())))
    rows.append(("characters of documents", f"{audit['document_chars']:,}"))
    rows.append(("scripts", ", ".join(f"{name} {share:.1%}" for name, share in script_shares(audit))))
    rows += [(f"leakage: {kind}", f"{n:,}") for kind, n in audit["leakage"].items()]
    rows += [(f"licence: {name}", f"{n:,}") for name, n in audit["licences"].items()]
    rows.append(("taken from the factbook", ", ".join(audit["from_factbook"]) or "nothing"))
    return rows + [("warning", warning) for warning in audit["warnings"]]


def _first(reason: Mapping[str, Any]) -> str:
    return str(reason["examples"][0])[:100]


def script_shares(audit: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(script, share of characters) over the first 1,000 characters of each document."""
    total = sum(audit["scripts"].values()) or 1
    return [(name, count / total) for name, count in audit["scripts"].items()]


def page(audit: Mapping[str, Any]) -> str:
    """The audit as one self-contained HTML page."""
    page = Page("Data audit")
    page.heading("Steps")
    add_steps(page, audit)
    page.heading("Splits and leakage")
    written = audit["written"].items()
    page.table(
        ["kind", "train", "validation", "test", "training records also held out"],
        [
            [k, *(c.get(s, 0) for s in ("train", "validation", "test")), audit["leakage"][k]]
            for k, c in written
        ],
    )
    page.heading("Lengths of documents")
    lengths = [
        (f"< {b['below_chars']:,} characters", b["documents"], None) for b in audit["length_histogram"]
    ]
    page.bar_chart("Documents by length", lengths)
    page.heading("Scripts, sources, licences")
    page.table(
        ["script", "share of characters"], [[name, f"{share:.1%}"] for name, share in script_shares(audit)]
    )
    page.table(["source", "records"], [[name, n] for name, n in audit["sources"].items()])
    page.table(["licence", "records"], [[name, n] for name, n in audit["licences"].items()])
    for warning in audit["warnings"]:
        page.paragraph(f"Warning: {warning}.")
    return page.html()


def add_steps(page: Page, audit: Mapping[str, Any]) -> None:
    """What each step read, kept, dropped and why; what cleaning edited."""
    steps = audit["steps"].items()
    page.table(
        ["step", "read", "kept", "dropped"], [[s, t["read"], t["kept"], t["dropped"]] for s, t in steps]
    )
    page.heading("Why records were dropped", 3)
    reasons = [
        [s, r["reason"], r["records"], " · ".join(r["examples"])] for s, t in steps for r in t["reasons"]
    ]
    page.table(["step", "reason", "records", "examples"], reasons)
    page.heading("What cleaning edited", 3)
    edits = [[rule, e["documents"], " · ".join(e["examples"])] for rule, e in audit["edits"].items()]
    page.table(["rule", "documents", "examples"], edits)
