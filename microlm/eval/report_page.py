"""The report's page, section by section. Enters: summary rows and artifacts; leaves: a `Page`.

A section whose artifact is not there is left out; a number that was not measured is a dash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from microlm.core import lineage
from microlm.core.artifact import Artifact
from microlm.core.metrics import read_metrics
from microlm.core.report import Page
from microlm.core.runs import seconds_of
from microlm.eval.baselines import NAMES

Rows = Sequence[Mapping[str, Any]]
TITLES = {
    "question_exact": "Fact questions, exact answer",
    "extraction_f1": "Extraction, triple F1, free decoding",
    "extraction_f1_real": "Extraction, triple F1, real entities",
    "extraction_f1_invented": "Extraction, triple F1, invented entities",
    "extraction_f1_constrained": "Extraction, triple F1, JSON schema",
    "constrained_valid": "Extraction, schema-valid with JSON schema",
    "eos": "Chats that stop at EOS",
    "bits_per_byte": "Held-out text, bits per byte",
    "verify": "Served model, checks passed",
}
TASKS = {
    "question": "Questions",
    "extraction": "Extraction, free decoding",
    "extraction_constrained": "Extraction, JSON schema",
    "chat": "Chats",
}


def build(rows: Rows, inputs: Mapping[str, Artifact], history: Sequence[Artifact]) -> Page:
    """The whole page; `history` are all artifacts of the run, oldest first."""
    name = _run_name(history)
    page = Page(
        f"MicroLM report: {name}", "What a run made, from what, and how well it does on held-out data"
    )
    _summary(page, rows, history)
    if scores := inputs.get("scores"):
        _scores(page, scores.json("scores.json"))
        _samples(page, scores.json("samples.json")["samples"])
    _training(page, history)
    for kind, section in _BY_KIND.items():
        if found := [a for a in history if a.kind == kind]:
            section(page, found[-1])
    if verdict := inputs.get("verify"):
        _verdict(page, verdict)
    if export := inputs.get("export"):
        _export(page, export)
    _lineage(page, inputs)
    _cost(page, history)
    return page


def _run_name(history: Sequence[Artifact]) -> str:
    return history[-1].url.rstrip("/").split("/")[-2] if "/" in history[-1].url.rstrip("/") else "run"


def _name(artifact: Artifact) -> str:
    return artifact.url.rstrip("/").rpartition("/")[2]


def _summary(page: Page, rows: Rows, history: Sequence[Artifact]) -> None:
    page.heading("Summary")
    page.facts({_title(r): _value(r["value"]) for r in rows})
    has_before = any(r["before"] is not None for r in rows)
    columns = ["score", "value", "95 % interval", "items", "limit", "reached", *map(_words, NAMES)]
    table = [
        [
            _title(r),
            _value(r["value"]),
            _interval(r),
            r["n"],
            _value(r["gate"]),
            {True: "yes", False: "NO", None: None}[r["ok"]],
            *(_value(r[name]) for name in NAMES),
            *([_value(r["before"])] if has_before else []),
        ]
        for r in rows
    ]
    page.table([*columns, *(["before"] if has_before else [])], table)
    page.paragraph(
        "Intervals resample entities (of bits per byte, documents), not items: items about one entity stand "
        "or fall together, and entities told of in one text are one. Shares have Wilson's where each item "
        "has its own entity, or all agree. The regex and the nearest-template answerers learn from the "
        "training split alone and use no model: they say how far one gets without one."
        + (" The column 'before' is an earlier checkpoint on the same items." if has_before else ""),
        note=True,
    )
    if any(
        a.kind == "data" and a.path.joinpath("logs/audit.json").exists() and _synthetic(a) for a in history
    ):
        page.paragraph(
            "The data is synthetic (the factbook): held-out entities and wordings test generalisation within "
            "that small world, and say nothing about natural text.",
            note=True,
        )


def _synthetic(data: Artifact) -> bool:
    return bool(data.json("logs/audit.json").get("from_factbook"))


def _scores(page: Page, scores: Mapping[str, Any]) -> None:
    page.heading("Scores by kind of wording")
    rows = scores["rows"]
    beside = {(b["name"], b["kind"], b["by"]): b for b in scores["baselines"] if b["lang"] == "all"}
    for name in ("question_exact", "extraction_f1", "extraction_f1_real", "extraction_f1_invented"):
        bars = []
        for r in (r for r in rows if r["lang"] == "all" and r["name"] in (name, f"{name}_constrained")):
            form = ", JSON schema" if r["name"] != name else ""
            bars.append(_bar(f"{r['kind']}{form}", r))
            for by in NAMES if not form else ():
                if b := beside.get((name, r["kind"], by)):
                    bars.append(_bar(f"{r['kind']}, {_words(by)}", b))
        if bars:
            title = TITLES[name].removesuffix(", free decoding")
            page.bar_chart(f"{title}, by kind of held-out wording", bars, maximum=1.0)
    sources = [r for r in rows if r["name"] == "bits_per_byte"]
    if len(sources) > 1:
        page.bar_chart("Held-out text, bits per byte, by source", [_bar(r["kind"], r) for r in sources])
    table = [
        [_words(r["name"]), r["kind"], r["lang"], r["value"], _interval(r), r["n"], r["entities"]]
        for r in rows
    ]
    if beyond := scores["gold_beyond_schema"]:
        asked = next(r["n"] for r in rows if r["name"] == "extraction_f1_constrained")
        page.paragraph(
            f"{beyond} of the {asked} gold answers do not fit the JSON schema, whose bounds come from the "
            "training split: constrained decoding cannot give them."
        )
    inner = Page("")
    inner.table(["score", "kind", "language", "value", "95 % interval", "items", "entities"], table)
    others = [
        [_words(b["name"]), b["by"], b["kind"], b["lang"], b["value"], _interval(b)]
        for b in scores["baselines"]
    ]
    inner.table(["score", "baseline", "kind", "language", "value", "95 % interval"], others, "Baselines")
    page.details(f"All scores by kind and language (scorer version {scores['scorer']})", inner)


def _bar(label: str, row: Mapping[str, Any]) -> tuple[str, float, tuple[float, float]]:
    return label, round(row["value"], 3), (round(row["low"], 3), round(row["high"], 3))


def _samples(page: Page, samples: Rows) -> None:
    page.heading("Samples")
    page.paragraph("Chosen by rule: the first right and the first wrong answers in order of id.", note=True)
    for task, title in TASKS.items():
        chosen = [s for s in samples if s["task"] == task]
        if chosen:
            page.heading(title, 3)
        for s in chosen:
            before = [(m["role"], m["content"]) for m in s["before"]]
            turns = [*before, ("user", s["prompt"]), ("assistant", s["output"] or "(nothing)")]
            judged = {True: "right", False: "wrong", None: f"ended by {s['finish_reason']}"}[s["right"]]
            cut = ", cut off at the token cap" if s["finish_reason"] == "length" else ""
            note = f"{judged}{cut}. {s['id']}" + ("" if s["right"] is not False else f". Gold: {s['gold']}")
            page.conversation(turns, note)


def _training(page: Page, history: Sequence[Artifact]) -> None:
    stages = [
        (a, read_metrics(a.path / "logs" / "metrics.jsonl"))
        for a in history
        if a.kind in ("model", "adapter")
    ]
    stages = [(a, rows) for a, rows in stages if rows]
    if not stages:
        return
    page.heading("Training")
    keys = ("parameters", "trained_parameters", "tokens", "loss", "validation_loss")
    table = [[_name(a), *(a.manifest["metrics"].get(k) for k in keys)] for a, _ in stages]
    page.table(["stage", *map(_words, keys)], table)
    lines: dict[str, list[tuple[float, float]]] = {}
    offset = 0.0
    for artifact, rows in stages:
        for key, title in (("loss", "training"), ("validation_loss", "validation")):
            points = [(offset + _tokens(r), r[key]) for r in rows if isinstance(r.get(key), int | float)]
            if points:
                lines[f"{_name(artifact)}, {title}"] = points
        offset += max(map(_tokens, rows))
    page.line_chart("Loss", lines, "tokens, all stages in turn", "nats per label")
    page.paragraph(
        "Losses of different stages are over different labels (all tokens of documents, the assistant's "
        "tokens of conversations), so the curves do not continue one another.",
        note=True,
    )


def _tokens(row: Mapping[str, Any]) -> float:
    return float(row.get("tokens", row["step"]))


def _data(page: Page, data: Artifact) -> None:
    page.heading("Data")
    page.facts(
        {
            "source": _source(data),
            "digest": data.digest[:12],
            "licences": ", ".join(data.manifest["licences"]),
        }
    )
    if not (data.path / "logs" / "audit.json").exists():
        return
    audit = data.json("logs/audit.json")
    steps = [[step, t["read"], t["kept"], t["dropped"]] for step, t in audit.get("steps", {}).items()]
    page.table(["step", "read", "kept", "dropped"], steps, "Every record is kept, or dropped with a reason")
    reasons = [
        [step, r["reason"], r["records"]]
        for step, t in audit.get("steps", {}).items()
        for r in t.get("reasons", ())
    ]
    if reasons:
        page.table(["step", "reason", "records"], reasons, "Dropped")
    written = audit.get("written", {})
    splits = ("train", "validation", "test")
    page.table(
        ["records", *splits, "training records that are held out too"],
        [
            [kind, *(n.get(s) for s in splits), audit.get("leakage", {}).get(kind)]
            for kind, n in written.items()
        ],
    )
    if audit.get("length_histogram"):
        bars = [(f"< {b['below_chars']:,}", b["documents"], None) for b in audit["length_histogram"]]
        page.bar_chart("Documents by length, in characters", bars)
    for sentence in audit.get("warnings", ()):
        page.paragraph(sentence)


def _source(data: Artifact) -> str:
    source = data.manifest["recipe"].get("source", "unknown")
    return source if isinstance(source, str) else ", ".join(source)


def _tokenizer(page: Page, tokenizer: Artifact) -> None:
    page.heading("Tokenizer")
    path = tokenizer.path / "logs" / "fertility.json"
    page.facts(
        {"vocabulary": tokenizer.manifest["metrics"].get("vocab_size"), "digest": tokenizer.digest[:12]}
    )
    if path.exists():
        keys = ("domain", "bytes", "tokens", "bytes_per_token", "tokens_per_char")
        rows = json.loads(path.read_bytes())
        page.table([*map(_words, keys)], [[r.get(k) for k in keys] for r in rows], "Held-out text by domain")


def _verdict(page: Page, verdict: Artifact) -> None:
    page.heading("Verification of the served model")
    details = verdict.path / "logs" / "verdict.json"
    checks = (
        json.loads(details.read_bytes())["checks"]
        if details.exists()
        else verdict.json("verdict.json")["checks"]
    )
    columns = ("status", "name", "detail", "seconds")
    page.table(["result", "check", "what was seen", "seconds"], [[c.get(k) for k in columns] for c in checks])


def _export(page: Page, export: Artifact) -> None:
    page.heading("Export")
    page.paragraph(f"A Hugging Face directory that plain transformers loads: {_name(export)}.")
    metrics = [
        [_words(k), v] for k, v in export.manifest["metrics"].items() if isinstance(v, int | float | str)
    ]
    page.table(["check against transformers", "value"], metrics)


def _lineage(page: Page, inputs: Mapping[str, Artifact]) -> None:
    page.heading("Lineage")
    nodes = [lineage.tree(a.url, verify=False) for a in inputs.values()]
    used = {part.url for node in nodes for part in node.walk() if part is not node}
    roots = {node.url: lineage.tree(node.url) for node in nodes if node.url not in used}
    intact = lineage.is_intact(list(roots.values()))
    page.paragraph(
        "Every file agrees with its manifest." if intact else "Some files differ from their manifests."
    )
    page.code(lineage.render(list(roots.values())))


def _cost(page: Page, history: Sequence[Artifact]) -> None:
    page.heading("Time, memory, environment")
    rows = []
    for a in history:
        peak = a.manifest["metrics"].get("peak_rss_bytes")
        rows.append([_name(a), a.manifest.get("stage"), _tenths(seconds_of(a)), _mebibytes(peak)])
    known = [s for a in history if (s := seconds_of(a)) is not None]
    total = _tenths(sum(known)) if len(known) == len(history) else None
    page.table(
        ["artifact", "stage", "seconds", "peak memory of the process so far, MiB"],
        [*rows, ["total", "", total, None]],
    )
    page.paragraph(
        "A stage states its peak memory where it measured it, and its time where it ran in one piece; "
        "a dash is not zero.",
        note=True,
    )
    last = history[-1].manifest
    environment = [[k, str(v)] for k, v in {**last["environment"], **last["code"]}.items() if v is not None]
    page.table(["environment", ""], environment)
    licences = sorted({word for a in history for word in a.manifest["licences"]})
    page.paragraph(f"Licences of the data that went in: {', '.join(licences) or 'none stated'}.")


def _tenths(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _mebibytes(size: float | None) -> int | None:
    return None if size is None else round(size / 2**20)


def _interval(row: Mapping[str, Any]) -> str | None:
    if row["low"] is None:
        return None
    return f"{_value(row['low'])} – {_value(row['high'])}"


def _value(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _title(row: Mapping[str, Any]) -> str:
    title = TITLES.get(row["name"], str(row["name"]))
    return title if row["kind"] in (None, "all") else f"{title}, {row['kind']} wordings"


def _words(name: str) -> str:
    return name.replace("_", " ")


_BY_KIND: Mapping[str, Callable[[Page, Artifact], None]] = {"data": _data, "tokenizer": _tokenizer}
