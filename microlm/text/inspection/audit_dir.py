"""The audit of files that are there, counted anew. Enters: parts. Leaves: numbers, examples, gates as JSON.

Nothing that the engine wrote about itself is believed; `logs/audit.json` is only shown beside it.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.text import sources
from microlm.text.corpus.engine import load_kernels
from microlm.text.corpus.pool import open_pool
from microlm.text.inspection import drift, overlap
from microlm.text.inspection.drift import Drift
from microlm.text.inspection.gates import Gate
from microlm.text.inspection.licences import NONCOMMERCIAL, SHARE_ALIKE, UNCLEAR, affected, concerns
from microlm.text.inspection.parts import ORDER, Found, Part
from microlm.text.inspection.survey import Findings, Group, Options, Task, survey
from microlm.text.split import Split

SCHEMA = 1
THRESHOLD = 0.8
NUMBERS = {
    "records": "records that can be read",
    "unreadable": "lines that cannot be read",
    "duplicates": "records that say what another of their split says",
    "leakage": "held-out records that another split holds too",
    "near_leakage": f"held-out records with a like one in another split (Jaccard of 5-grams ≥ {THRESHOLD})",
    "eos_cut": "share of answers whose end is beyond the context",
    "mask_errors": "conversations whose loss mask is wrong",
    "drift": "keys, topics and tasks that one split has and another lacks",
    "unknown_licence": "records whose licence is not stated or unclear",
    "noncommercial_licence": "records for non-commercial use only",
    "sharealike_licence": "records whose licence is share-alike",
}
"""The numbers that gates name."""


@dataclass
class Outcome:
    """All that was found; `near` is keyed by the held-out record."""

    groups: dict[str, Group] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    near: dict[tuple[int, int], tuple[int, int, float]] = field(default_factory=dict)
    near_kinds: Counter[str] = field(default_factory=Counter)

    def add(self, found: Findings) -> None:
        """Enter a block."""
        self.groups.setdefault(found.part.name, Group()).add(found.group)
        for gate, names in found.examples.items():
            shown = self.examples.setdefault(gate, [])
            shown += names[: overlap.MAX_EXAMPLES - len(shown)]
        for block, row, mine, value, kind in found.near:
            if (block, row) not in self.near:
                self.near[block, row] = found.number, mine, value
                self.near_kinds[kind] += 1


def measured(tokenizer: Path | None, near: bool) -> dict[str, bool]:
    """Which numbers an audit with these options gives."""
    return {"eos_cut": tokenizer is not None, "mask_errors": tokenizer is not None, "near_leakage": near}


def audit(
    found: Found, context: int, tokenizer: Path | None, near: bool, processes: int, gates: Sequence[Gate] = ()
) -> dict[str, Any]:
    """The audit as plain values, the same for any number of processes."""
    with tempfile.TemporaryDirectory(prefix="microlm-audit-") as name:
        options = Options(Path(name), context, tokenizer, THRESHOLD if near else 0.0)
        outcome, blocks = _survey(found, options, processes)
        repeats = overlap.repeats(options.folder, blocks)
        for kind, pairs in repeats.pairs.items():
            outcome.examples[kind] = [_pair(options.folder, *pair) for pair in pairs]
        outcome.examples["near_leakage"] = [
            _pair(options.folder, held, (block, row), f"~ {value:.2f}")
            for held, (block, row, value) in sorted(outcome.near.items())[: overlap.MAX_EXAMPLES]
        ]
    if not any(group.records for group in outcome.groups.values()):
        raise UserError(
            f"{found.parts[0].source.place}: no line of it can be read"
            f" ({outcome.examples.get('unreadable', ['it is empty'])[0]}); check the format"
        )
    groups = {p.name: outcome.groups[p.name] for p in found.parts if p.name in outcome.groups}
    drifts = list(_drifts(found.parts, groups))
    outcome.examples["drift"] = [str(d) for d in drifts[: overlap.MAX_EXAMPLES]]
    by_kind = {
        "duplicates": dict(sorted(repeats.duplicates.items())),
        "leakage": dict(sorted(repeats.leakage.items())),
        "near_leakage": dict(sorted(outcome.near_kinds.items())) if near else None,
    }
    numbers = _numbers(groups, by_kind, drifts, tokenizer is not None)
    licences = _licences(groups)
    for name, concern in _CONCERNS.items():
        outcome.examples[name] = [
            f"{part}: {count:,} under {licence}"
            for part, group in groups.items()
            for licence, count in group.licences.items()
            if concern in concerns(licence)
        ][: overlap.MAX_EXAMPLES]
    return {
        "schema_version": SCHEMA,
        "context": context,
        "numbers": numbers,
        "by_kind": by_kind,
        "examples": {k: v for k, v in outcome.examples.items() if v},
        "parts": [_part_json(name, group, tokenizer is not None) for name, group in groups.items()],
        "drift": [d.to_json() for d in drifts],
        "licences": licences,
        "left_out": list(found.left_out),
        "prepared": _prepared(found.root),
        "gates": [_gate_json(gate, numbers) for gate in gates],
    }


_CONCERNS = {
    "unknown_licence": UNCLEAR, "noncommercial_licence": NONCOMMERCIAL, "sharealike_licence": SHARE_ALIKE
}  # fmt: skip


def _survey(found: Found, options: Options, processes: int) -> tuple[Outcome, int]:
    """Look at all blocks, the held-out splits first, so that the others can be compared with them."""
    outcome, numbers = Outcome(), itertools.count()
    splits = [split for split in reversed(ORDER) if any(p.split == split for p in found.parts)]
    held_out: dict[str, list[int]] = {}
    total = sum(part.source.size_bytes() or 0 for part in found.parts) or None

    def tasks(split: Split) -> Iterator[Task]:
        for part in (p for p in found.parts if p.split == split):
            earlier = tuple(held_out.get(part.kind, ()))
            for block in sources.blocks(part.source):
                yield Task(options, part, next(numbers), block, earlier, split != splits[-1])

    with open_pool(processes, load_kernels) as pool, Progress("audit", total, "bytes") as bar:
        for split in splits:
            done: list[tuple[str, int]] = []
            for result in pool.map(survey, tasks(split)):
                outcome.add(result)
                bar.update(result.consumed)
                if result.group.records:
                    done.append((result.part.kind, result.number))
            for kind, number in done:
                held_out.setdefault(kind, []).append(number)
    return outcome, next(numbers)


def _numbers(
    groups: Mapping[str, Group],
    by_kind: Mapping[str, Mapping[str, int] | None],
    drifts: Sequence[Drift],
    masks: bool,
) -> dict[str, float | None]:
    """One value for each of NUMBERS, None for what was not measured."""
    every = Group()
    licences: Counter[str] = Counter()
    for group in groups.values():
        every.add(group)
        licences.update(group.licences)
    sums = {name: None if counts is None else sum(counts.values()) for name, counts in by_kind.items()}
    return {
        "records": every.records,
        "unreadable": every.unreadable.total(),
        **sums,
        "eos_cut": every.cut / every.answers if masks and every.answers else 0.0 if masks else None,
        "mask_errors": every.mask_faults.total() if masks else None,
        "drift": len(drifts),
        **{name: affected(licences, concern) for name, concern in _CONCERNS.items()},
    }


def _licences(groups: Mapping[str, Group]) -> list[dict[str, Any]]:
    counts: Counter[str] = Counter()
    for group in groups.values():
        counts.update(group.licences)
    return [{"licence": n, "records": c, "asks": list(concerns(n))} for n, c in _ranked(counts)]


def _drifts(parts: Sequence[Part], groups: Mapping[str, Group]) -> Iterator[Drift]:
    """What the splits of each kind lack of each other."""
    for kind in dict.fromkeys(p.kind for p in parts):
        mine = {p.name: groups[p.name] for p in parts if p.kind == kind and p.name in groups}
        yield from drift.compare("key", {name: (g.objects, g.keys) for name, g in mine.items()})
        yield from drift.compare("topic", {name: (g.topics.total(), g.topics) for name, g in mine.items()})
        yield from drift.compare("task", {name: (g.tasks.total(), g.tasks) for name, g in mine.items()})


def _part_json(name: str, group: Group, masks: bool) -> dict[str, Any]:
    """A part's counts; what only a tokenizer can tell is null without one."""
    return {
        "part": name,
        "records": group.records,
        "unreadable": dict(_ranked(group.unreadable)),
        "chars": group.chars,
        "length_histogram": _histogram(group.lengths, "below_chars"),
        "languages": dict(_ranked(group.languages)),
        "topics": dict(_ranked(group.topics)),
        "tasks": dict(_ranked(group.tasks)),
        "keys": dict(_ranked(group.keys)),
        "sources": dict(_ranked(group.sources)),
        "licences": dict(_ranked(group.licences)),
        "tokens": group.tokens if masks else None,
        "token_histogram": _histogram(group.token_lengths, "below_tokens") if masks else None,
        "answers": group.answers if masks else None,
        "answers_cut": group.cut if masks else None,
        "mask_faults": dict(_ranked(group.mask_faults)) if masks else None,
    }


def _histogram(lengths: Counter[int], name: str) -> list[dict[str, int]]:
    return [{name: 1 << bits, "records": lengths[bits]} for bits in sorted(lengths)]


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first; equal ones by name, so that the order of blocks does not show."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _pair(folder: Path, one: tuple[int, int], other: tuple[int, int], sign: str = "=") -> str:
    return f"{overlap.name(folder, *one)} {sign} {overlap.name(folder, *other)}"


def _prepared(root: Path | None) -> Any:
    """What the engine wrote about its steps, if that is there."""
    path = root / "logs" / "audit.json" if root else None
    return json.loads(path.read_bytes()) if path and path.is_file() else None


def _gate_json(gate: Gate, numbers: Mapping[str, float | None]) -> dict[str, Any]:
    value = numbers[gate.name]
    return {
        "gate": str(gate),
        "name": gate.name,
        "value": value,
        "failed": value is None or gate.fails(value),
    }
