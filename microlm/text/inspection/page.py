"""An audit for people. Enters: the audit as plain values. Leaves: rows for a terminal, one HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from microlm.core.report import Bar, Page
from microlm.text.audit import add_steps
from microlm.text.inspection.audit_dir import NUMBERS, THRESHOLD
from microlm.text.inspection.licences import Concern

MOST = 20  # names of a table before the rest is one row
_SHARES = ("eos_cut",)


def figure(name: str, value: float | None) -> str:
    """A number of the audit as text."""
    if value is None:
        return "not measured"
    return f"{value:.2%}" if name in _SHARES else f"{value:,.0f}"


def rows(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The audit as (name, value) rows."""
    found = [
        (p["part"], f"{p['records']:,} records, {p['chars']:,} characters, {_most(p['languages'])}")
        for p in audit["parts"]
    ]
    for name, value in audit["numbers"].items():
        kinds = audit["by_kind"].get(name)
        detail = ", ".join(f"{kind} {count:,}" for kind, count in kinds.items()) if kinds else ""
        found.append((name, figure(name, value) + (f" ({detail})" if detail else "")))
    found += [("drift", line) for line in audit["examples"].get("drift", [])]
    found += [(f"licence: {row['licence']}", _records(row)) for row in audit["licences"]]
    return found + [("not audited", name) for name in audit["left_out"]]


def _most(names: Mapping[str, int]) -> str:
    total = sum(names.values()) or 1
    return ", ".join(f"{name} {count / total:.0%}" for name, count in list(names.items())[:3])


def _records(row: Mapping[str, Any]) -> str:
    asks = f" ({', '.join(row['asks'])})" if row["asks"] else ""
    return f"{row['records']:,} records{asks}"


def page(audit: Mapping[str, Any], where: str) -> str:
    """The audit as one self-contained HTML page."""
    made = Page("Data audit", where)
    numbers = audit["numbers"]
    made.facts({name.replace("_", " "): figure(name, value) for name, value in numbers.items()})
    _gates(made, audit["gates"])
    made.heading("Parts")
    _parts(made, audit["parts"])
    made.heading("Splits")
    _overlap(made, audit)
    made.heading("Lengths")
    _lengths(made, audit["parts"])
    made.heading("Languages, topics, tasks")
    for title, key in (("language", "languages"), ("topic", "topics"), ("task", "tasks")):
        _cross(made, title, key, audit["parts"])
    made.heading("Answers and loss masks")
    _masks(made, audit)
    made.heading("Field drift")
    _drift(made, audit)
    made.heading("Licences and sources")
    for row in audit["licences"]:
        if row["asks"]:
            made.paragraph(f"Warning: {Concern(row['licence'], row['records'], tuple(row['asks']))}.")
    _cross(made, "licence", "licences", audit["parts"])
    _cross(made, "source", "sources", audit["parts"])
    if audit["prepared"]:
        made.heading("What preparing did")
        made.paragraph(
            "As the data stage wrote it down; all above was counted anew from the files.", note=True
        )
        add_steps(made, audit["prepared"])
    _all_examples(made, audit["examples"])
    return made.html()


def _gates(made: Page, gates: Sequence[Mapping[str, Any]]) -> None:
    if gates:
        made.heading("Gates")
        states = [
            [g["gate"], figure(g["name"], g["value"]), "FAILED" if g["failed"] else "ok"] for g in gates
        ]
        made.table(["fails if", "value", "result"], states)


def _parts(made: Page, parts: Sequence[Mapping[str, Any]]) -> None:
    made.table(
        ["part", "records", "unreadable", "characters"],
        [[p["part"], p["records"], sum(p["unreadable"].values()), p["chars"]] for p in parts],
    )
    made.bar_chart("Records by part", [(p["part"], p["records"], None) for p in parts])
    faults = [[p["part"], reason, count] for p in parts for reason, count in p["unreadable"].items()]
    if faults:
        made.table(["part", "why a line cannot be read", "lines"], faults)


def _overlap(made: Page, audit: Mapping[str, Any]) -> None:
    by_kind = audit["by_kind"]
    kinds = sorted({kind for counts in by_kind.values() for kind in counts or ()}) or ["all"]
    columns = (
        ("duplicates", "repeated in their split"),
        ("leakage", "equal in another"),
        ("near_leakage", "alike"),
    )
    made.table(
        ["kind", *(title for _, title in columns)],
        [
            [kind, *(None if by_kind[name] is None else by_kind[name].get(kind, 0) for name, _ in columns)]
            for kind in kinds
        ],
        "Records that another record of their split repeats, or another split holds too",
    )
    made.paragraph(
        "Equal: the same but for width, case, whitespace and punctuation. Alike: found by MinHash, compared "
        f"exactly; Jaccard of runs of five characters (words in Latin script) of at least {THRESHOLD}. "
        "Records are compared with records of their own kind.",
        note=True,
    )


def _lengths(made: Page, parts: Sequence[Mapping[str, Any]]) -> None:
    for kind in dict.fromkeys(_kind(p) for p in parts):
        lengths: Counter[int] = Counter()
        for row in (r for p in parts if _kind(p) == kind for r in p["length_histogram"]):
            lengths[row["below_chars"]] += row["records"]
        bars: list[Bar] = [(f"< {n:,} characters", lengths[n], None) for n in sorted(lengths)]
        made.bar_chart(f"{kind} by length", bars)


def _kind(part: Mapping[str, Any]) -> str:
    kind, slash, _ = part["part"].partition("/")
    return str(kind) if slash else "records"


def _cross(made: Page, title: str, key: str, parts: Sequence[Mapping[str, Any]]) -> None:
    """Names down, parts across."""
    mine = [p for p in parts if p[key]]
    total: Counter[str] = Counter()
    for part in mine:
        total.update(part[key])
    if not total:
        return
    names = sorted(total, key=lambda n: (-total[n], n))
    table: list[list[str | int]] = [[n, *(p[key].get(n, 0) for p in mine)] for n in names[:MOST]]
    if rest := names[MOST:]:
        table.append([f"{len(rest):,} more", *(sum(p[key].get(n, 0) for n in rest) for p in mine)])
    made.table([title, *(p["part"] for p in mine)], table)


def _masks(made: Page, audit: Mapping[str, Any]) -> None:
    if audit["numbers"]["mask_errors"] is None:
        made.paragraph("Not measured: the audit had no tokenizer (--tokenizer DIR).")
        return
    mine = [p for p in audit["parts"] if p["answers"]]
    made.table(
        ["part", "tokens", "answers", f"answers cut at {audit['context']} tokens", "faulty masks"],
        [
            [p["part"], p["tokens"], p["answers"], p["answers_cut"], sum(p["mask_faults"].values())]
            for p in mine
        ],
    )
    lengths: Counter[int] = Counter()
    for row in (r for p in mine for r in p["token_histogram"]):
        lengths[row["below_tokens"]] += row["records"]
    bars: list[Bar] = [(f"< {n:,} tokens", lengths[n], None) for n in sorted(lengths)]
    made.bar_chart("Conversations by tokens", bars)
    faults = [[p["part"], reason, count] for p in mine for reason, count in p["mask_faults"].items()]
    if faults:
        made.table(["part", "what is wrong with a loss mask", "conversations"], faults)


def _drift(made: Page, audit: Mapping[str, Any]) -> None:
    if not audit["drift"]:
        made.paragraph("The splits of each kind have the same keys, topics and tasks.")
        return
    made.table(
        ["what", "name", "is in", "records", "is not in", "there perhaps"],
        [
            [d["what"], d["name"], d["present"], d["records"], d["absent"], d["similar"]]
            for d in audit["drift"]
        ],
    )


def _all_examples(made: Page, examples: Mapping[str, Sequence[str]]) -> None:
    if examples:
        made.heading("Examples")
    for name, lines in examples.items():
        made.details(f"{name}: {NUMBERS[name]}", "\n".join(lines))
