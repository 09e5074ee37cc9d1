"""The pages of `microlm tokenizer compare` and `show`. Enters: what was measured. Leaves: one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from microlm.core.report import Page
from microlm.text.vocab import view
from microlm.text.vocab.view import Part

_EXPLAINED = (
    "Bytes per token: UTF-8 bytes of text that a token stands for; more is better, since a model then reads "
    "and writes a text in fewer steps. A Han character has three bytes, a Latin letter one. Lost characters "
    "cannot be got back from the ids: they became an unknown token, or nothing. A changed text is one that "
    "does not come back as it was, be it only in its spaces or capitals."
)
_SHARE = (
    "The embedding has one row for each entry of the vocabulary; untied, the output has as many again. What "
    "it takes of the parameters is not there for the layers. Work: multiply-adds of the layers and the "
    "output for a byte of text; where the vocabulary is too large it rises again."
)


def comparison(report: Mapping[str, Any], title: str) -> str:
    """The page of a comparison: totals, domains, the budget of models, one text as each cuts it."""
    page = Page(title, ", ".join(f"{name} {size:,} bytes" for name, size in report["domains"].items()))
    page.heading("Together")
    page.table(
        ["tokenizer", "algorithm", "entries", "bytes per token", "tokens per character", "lost", "changed"],
        [
            [m["tokenizer"], m["algorithm"], m["vocab_size"], m["bytes_per_token"],
             m["tokens_per_character"], m["lost_characters"], f"{m['changed_texts']} of {m['texts']}"]
            for m in report["tokenizers"]
        ],
        "means over the domains; lost: characters, changed: texts",
    )  # fmt: skip
    page.paragraph(_EXPLAINED, note=True)
    _domains(page, report["rows"])
    if report["budget"]:
        _budget(page, report["budget"], report["sizes"])
    if report["example"]["text"]:
        page.heading("How a text is cut")
        for name, row in report["example"]["cuts"].items():
            _cut(page, name, row)
        page.paragraph("A small number counts the tokens that a part takes; red is unknown.", note=True)
    return page.html()


def cuts(text: str, rows: Mapping[str, Sequence[Part]]) -> str:
    """The page of `show`: a text as tokenizers cut it."""
    page = Page("How a text is cut", f"{len(text):,} characters, {len(text.encode()):,} bytes")
    for name, row in rows.items():
        _cut(page, name, row)
    return page.html()


def _domains(page: Page, rows: Sequence[Mapping[str, Any]]) -> None:
    page.heading("By domain")
    names = list(dict.fromkeys(row["domain"] for row in rows))
    grouped = {
        name: {row["tokenizer"]: row["bytes_per_token"] for row in rows if row["domain"] == name}
        for name in names
    }
    page.group_chart("bytes per token", grouped)
    every = Page("")
    every.table(
        ["domain", "tokenizer", "tokens", "bytes per token", "tokens per character", "lost", "changed"],
        [
            [row["domain"], row["tokenizer"], row["tokens"], row["bytes_per_token"],
             row["tokens_per_character"], row["lost_characters"], f"{row['changed_texts']} of {row['texts']}"]
            for row in sorted(rows, key=lambda row: names.index(row["domain"]))
        ],
    )  # fmt: skip
    page.details("In numbers", every)


def _budget(page: Page, rows: Sequence[Mapping[str, Any]], sizes: Sequence[str]) -> None:
    page.heading("The embedding's share of a model")
    models = list(dict.fromkeys(row["model"] for row in rows))
    ordered = sorted(
        (row for row in rows if row["tokenizer"] in sizes), key=lambda row: int(row["vocab_size"])
    )

    def lines(x: str, y: str, scale: float = 1.0) -> dict[str, list[tuple[float, float]]]:
        return {
            model: [
                (row[x] * scale, row[y])
                for row in ordered
                if row["model"] == model and row["bytes_per_token"] is not None
            ]
            for model in models
        }

    if len(sizes) > 1:
        points = lines("share_tied", "bytes_per_token", 100.0)
        page.line_chart("bytes per token against the share, tied", points, "% of the parameters")
        work = lines("vocab_size", "work_per_byte")
        least = {model: min(y for _, y in line) for model, line in work.items() if line}
        page.line_chart(
            "multiply-adds for a byte of text, the least of each model = 1",
            {m: [(x, y / least[m]) for x, y in line] for m, line in work.items() if line},
            "entries",
        )
    page.table(
        ["model", "tokenizer", "entries", "layers", "share tied", "share untied", "work a byte"],
        [
            [row["model"], row["tokenizer"], row["vocab_size"], row["body"],
             f"{row['share_tied']:.1%}", f"{row['share_untied']:.1%}", row["work_per_byte"]]
            for row in sorted(rows, key=lambda row: (models.index(row["model"]), row["vocab_size"]))
        ],
        "layers: parameters but for embedding and output",
    )  # fmt: skip
    page.paragraph(_SHARE, note=True)


def _cut(page: Page, name: str, row: Sequence[Part]) -> None:
    tokens = sum(part.tokens for part in row)
    page.pieces(f"{name}: {tokens:,} tokens", [(view.shown(part), part.kind) for part in row])
