"""A self-contained HTML page: headings, tables, charts, details. No script, no request; dark and light.

Enters: plain text and numbers, all escaped here. Leaves: one HTML string.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from microlm.core.report import charts
from microlm.core.report.charts import escape

Cell = str | int | float | None
Point = tuple[float, float]
PieceKind = Literal["token", "unknown", "dropped"]
Bar = tuple[str, float | None, tuple[float, float] | None]


class Page:
    """Call its methods in the order of the page, then `html()`. Headings fill the table of contents."""

    def __init__(self, title: str, subtitle: str = "", lang: str = "en") -> None:
        self.title, self.subtitle, self.lang = title, subtitle, lang
        self._parts: list[str] = []
        self._contents: list[tuple[int, str, str]] = []

    def heading(self, text: str, level: int = 2) -> None:
        """A section (level 2) or subsection (3, 4)."""
        assert level in (2, 3, 4), level
        anchor = f"s{len(self._contents) + 1}"
        self._contents.append((level, anchor, text))
        self._parts.append(f'<h{level} id="{anchor}">{escape(text)}</h{level}>')

    def paragraph(self, text: str, *, note: bool = False) -> None:
        """Running text; `note` sets it smaller and quieter. A blank line starts a new paragraph."""
        kind = ' class="note"' if note else ""
        blocks = [b for b in re.split(r"\n\s*\n", text) if b.strip()]
        self._parts += [f"<p{kind}>{escape(b.strip())}</p>" for b in blocks]

    def code(self, text: str) -> None:
        """Text in which spaces count: a recipe, a lineage tree, a sample."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> None:
        """A table; a column of numbers is right-aligned, None is shown as a dash."""
        numeric = [_is_numeric([row[i] for row in rows if i < len(row)]) for i in range(len(columns))]
        mark = [' class="number"' if n else "" for n in numeric]
        head = "".join(f'<th scope="col"{m}>{escape(c)}</th>' for c, m in zip(columns, mark, strict=True))
        body = []
        for row in rows:
            cells = zip(row, mark, strict=True)
            body.append("<tr>" + "".join(f"<td{m}>{escape(shown(c))}</td>" for c, m in cells) + "</tr>")
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        inner = f"<thead><tr>{head}</tr></thead><tbody>" + "\n".join(body) + "</tbody>"
        self._parts.append(f'<div class="wide"><table>{title}{inner}</table></div>')

    def facts(self, values: Mapping[str, Cell]) -> None:
        """A few large numbers side by side: label → value."""
        tiles = "".join(
            f"<div><dt>{escape(k)}</dt><dd>{escape(shown(v))}</dd></div>" for k, v in values.items()
        )
        self._parts.append(f'<dl class="facts">{tiles}</dl>')

    def line_chart(
        self,
        title: str,
        series: Mapping[str, Sequence[Point]],
        x_label: str = "",
        y_label: str = "",
        *,
        log_y: bool = False,
    ) -> None:
        """Lines over numbers: name → [(x, y), …]; points that are not finite are left out."""
        self._figure(title, charts.lines(title, series, x_label, y_label, log_y=log_y))

    def bar_chart(
        self, title: str, bars: Sequence[Bar], unit: str = "", maximum: float | None = None
    ) -> None:
        """Horizontal bars: (label, value, (low, high) or None); a value of None reads "not measured"."""
        self._figure(title, charts.bars(title, bars, unit, maximum))

    def group_chart(self, title: str, rows: Mapping[str, Mapping[str, float | None]], unit: str = "") -> None:
        """Bars side by side: group → series → value; None reads "not measured"."""
        self._figure(title, charts.groups(title, rows, unit))

    def pieces(self, label: str, row: Sequence[tuple[str, PieceKind]]) -> None:
        """A text cut into pieces, in alternating colours; unknown and dropped ones stand out."""
        tone, spans = 0, []
        for text, kind in row:
            name = f"p{tone % charts.COLOURS}" if kind == "token" else kind
            tone += kind == "token"
            spans.append(f'<span class="{name}">{escape(text)}</span>')
        self._parts.append(f'<div class="pieces"><b>{escape(label)}</b><p>{"".join(spans)}</p></div>')

    def details(self, summary: str, inner: Page | str) -> None:
        """A block that is folded until it is clicked: another page's parts, or plain text."""
        body = "\n".join(inner._parts) if isinstance(inner, Page) else f"<pre>{escape(inner)}</pre>"
        self._parts.append(f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>")

    def conversation(self, turns: Sequence[tuple[str, str]], note: str = "") -> None:
        """A chat: (role, text) in order."""
        rows = "".join(
            f'<div class="turn {"answer" if role == "assistant" else "asked"}">'
            f"<b>{escape(role)}</b><span>{escape(text)}</span></div>"
            for role, text in turns
        )
        foot = f'<p class="note">{escape(note)}</p>' if note else ""
        self._parts.append(f'<div class="chat">{rows}{foot}</div>')

    def html(self) -> str:
        """The whole page."""
        css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        parts = "\n".join(self._parts)
        return f"""<!doctype html>
<html lang="{escape(self.lang)}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(self.title)}</title>
<style>
{css}</style>
</head>
<body>
<header><h1>{escape(self.title)}</h1>{subtitle}</header>
{self._contents_html()}<main>
{parts}
</main>
</body>
</html>
"""

    def _contents_html(self) -> str:
        top = [(anchor, text) for level, anchor, text in self._contents if level == 2]
        if len(top) < 3:
            return ""
        links = "".join(f'<li><a href="#{a}">{escape(t)}</a></li>' for a, t in top)
        return f'<nav aria-label="Contents"><ol>{links}</ol></nav>\n'

    def _figure(self, title: str, svg: str) -> None:
        self._parts.append(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>")


def shown(value: Cell) -> str:
    """A cell's text: thousands separated, four significant digits, a dash for what was not measured."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


_NUMBER = re.compile(
    r"[-+]?[\d.,]+(?:–[-+]?[\d.,]+)?(?:e[-+]?\d+)?(?: ?(?:%|s|ms|min|[KMG]i?B|B|±.*|\[.*|\(.*))?$",
    re.IGNORECASE,
)


def _is_numeric(cells: Sequence[Cell]) -> bool:
    told = [c for c in cells if c is not None and c not in ("", "–")]
    return bool(told) and all(
        _NUMBER.match(c) is not None if isinstance(c, str) else not isinstance(c, bool) for c in told
    )
