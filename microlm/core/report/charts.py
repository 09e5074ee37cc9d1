"""Inline SVG charts. Enters: named points or labelled values. Leaves: one accessible `<svg>` string.

Colours come from the page's CSS variables, so that a chart follows dark and light. Units: CSS pixels.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 44
COLOURS = 6  # --c0 … --c5 in page.css; more series get dashes
MAX_POINTS = 400

Point = tuple[float, float]


def escape(text: str) -> str:
    """Text → HTML; characters that no HTML may hold become the replacement character."""
    legal = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
    return html.escape(legal)


def lines(
    title: str, series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, *, log_y: bool = False
) -> str:
    """A line chart with axes, ticks and a legend; a table of first and last values is its description."""
    clean = {name: thin(_finite(points, log_y)) for name, points in series.items()}
    points = [p for line in clean.values() for p in line]
    if not points:
        return _empty(title)
    x = _Axis([p[0] for p in points], LEFT, WIDTH - RIGHT)
    y = _Axis([p[1] for p in points], HEIGHT - BOTTOM, TOP, log=log_y)
    parts = [_frame(x, y, x_label, y_label)]
    for i, line in enumerate(clean.values()):
        path = "M" + "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in line)
        if len(line) == 1:
            cx, cy = x.at(line[0][0]), y.at(line[0][1])
            parts.append(f'<circle class="c{i % COLOURS}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"/>')
        elif line:
            dash = ' stroke-dasharray="6 4"' if i >= COLOURS else ""
            parts.append(f'<path class="line c{i % COLOURS}"{dash} d="{path}"/>')
    told = [f"{name}: {number(line[0][1])} to {number(line[-1][1])}" for name, line in clean.items() if line]
    legend, depth = _legend(list(clean)) if len(clean) > 1 else ("", 0)
    return _svg(title, "; ".join(told), HEIGHT + depth, "".join(parts) + legend)


def bars(
    title: str,
    rows: Sequence[tuple[str, float | None, tuple[float, float] | None]],
    unit: str,
    maximum: float | None,
) -> str:
    """Horizontal bars with their values; an interval is drawn as a whisker."""
    if not rows:
        return _empty(title)
    ends = [e for _, v, i in rows for e in (v or 0.0, *(i or ())) if math.isfinite(e)]
    top = maximum or max([*ends, 0.0]) or 1.0
    left = 16.0 + min(300, max(_text_width(label) for label, _, _ in rows))
    across = _Axis([0.0, top], left, WIDTH - 130)
    drawn = [_bar(18 + 30 * i, across, row, unit) for i, row in enumerate(rows)]
    return _svg(title, "; ".join(told for told, _ in drawn), 30 * len(rows) + 8, "".join(b for _, b in drawn))


def _bar(
    y: int, across: _Axis, row: tuple[str, float | None, tuple[float, float] | None], unit: str
) -> tuple[str, str]:
    """A bar in words and as SVG, centred on `y`."""
    label, value, interval = row
    left, text, body = across.start, "not measured", ""

    def at(number: float) -> float:
        return min(max(across.at(number), left), across.end)

    end = left
    if value is not None and math.isfinite(value):
        text, end = f"{number(value)}{unit}", at(value)
        body = f'<rect class="bar" x="{left}" y="{y - 9}" width="{end - left:.1f}" height="18" rx="2"/>'
    if interval and all(map(math.isfinite, interval)):
        low, high = at(interval[0]), at(interval[1])
        end = max(end, high)
        text += f" [{number(interval[0])}, {number(interval[1])}]"
        caps = f"M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"
        body += f'<path class="whisker" d="M{low:.1f} {y}H{high:.1f}{caps}"/>'
    name = f'<text class="label" x="{left - 8}" y="{y + 4}" text-anchor="end">{_short(label, left)}</text>'
    told = f'<text class="value" x="{end + 8:.1f}" y="{y + 4}">{escape(text)}</text>'
    return f"{label}: {text}", name + body + told


def groups(title: str, rows: Mapping[str, Mapping[str, float | None]], unit: str) -> str:
    """Horizontal bars side by side: group → series → value, one colour a series, from zero."""
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    known = [v for values in rows.values() for v in values.values() if v is not None and math.isfinite(v)]
    if not known:
        return _empty(title)
    left = 16.0 + min(200, max(map(_text_width, rows)))
    across = _Axis([0.0, max(known) or 1.0], left, WIDTH - 90)
    parts, told, y = [], [], 6
    for group, values in rows.items():
        middle = y + 7 * len(values) + 4
        short = _short(group, left)
        parts.append(f'<text class="label" x="{left - 8}" y="{middle}" text-anchor="end">{short}</text>')
        for name, value in values.items():
            shown = "not measured" if value is None or not math.isfinite(value) else f"{number(value)}{unit}"
            width = across.at(value) - left if value is not None and math.isfinite(value) else 0.0
            again = " again" if names.index(name) >= COLOURS else ""
            colour = f'class="filled c{names.index(name) % COLOURS}{again}"'
            parts.append(f'<rect {colour} x="{left}" y="{y}" width="{width:.1f}" height="11" rx="2"/>')
            parts.append(
                f'<text class="value" x="{left + width + 6:.1f}" y="{y + 10}">{escape(shown)}</text>'
            )
            told.append(f"{group}, {name}: {shown}")
            y += 14
        y += 12
    legend, depth = _legend(names, y) if len(names) > 1 else ("", 0)
    return _svg(title, "; ".join(told), y + depth, "".join(parts) + legend)


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about `MAX_POINTS` points, evenly chosen, the first and the last among them."""
    if len(points) <= MAX_POINTS:
        return list(points)
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(i * step)] for i in range(MAX_POINTS)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's text: 12M, 3.5k, 0.002."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}"


class _Axis:
    """Numbers → pixels, linear or logarithmic, with ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False) -> None:
        self.log = log
        low, high = min(map(self._scale, values)), max(map(self._scale, values))
        margin = (high - low) * 0.04 if start > end else 0.0
        if high == low:
            margin = abs(high) * 0.1 or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def at(self, value: float) -> float:
        """The pixel of a number."""
        return self.start + (self._scale(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """The numbers that are marked."""
        if not self.log:
            return ticks(self.low, self.high)
        low, high = 10**self.low, 10**self.high
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        marks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
        return marks if len(marks) >= 2 else ticks(low, high)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for v in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y.at(v):.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y.at(v) + 4:.1f}" text-anchor="end">{number(v)}</text>')
    for v in x.ticks():
        parts.append(f'<path class="axis" d="M{x.at(v):.1f} {bottom}v5"/>')
        parts.append(f'<text x="{x.at(v):.1f}" y="{bottom + 18}" text-anchor="middle">{number(v)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    middle = (TOP + bottom) / 2
    for place, label in (
        (f'x="{(LEFT + right) / 2}" y="{HEIGHT - 6}"', x_label),
        (f'transform="translate(14 {middle}) rotate(-90)"', y_label),
    ):
        parts.append(f'<text {place} text-anchor="middle">{escape(label)}</text>')
    return "".join(parts)


def _legend(names: Sequence[str], top: int = HEIGHT) -> tuple[str, int]:
    """The legend below a chart of this height, and its own height."""
    parts, x, y = [], LEFT, top + 14
    for i, name in enumerate(names):
        width = 34 + _text_width(name)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, y = LEFT, y + 20
        dash = ' stroke-dasharray="6 4"' if i >= COLOURS else ""
        parts.append(f'<path class="line c{i % COLOURS}"{dash} d="M{x} {y - 4}h18"/>')
        parts.append(f'<text x="{x + 24}" y="{y}">{escape(name)}</text>')
        x += width + 12
    return "".join(parts), y - top + 10


def _svg(title: str, description: str, height: float, body: str) -> str:
    label = escape(f"{title}. {description}" if description else title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>{body}</svg>'
    )


def _empty(title: str) -> str:
    return _svg(title, "nothing was measured", 40, f'<text x="{LEFT}" y="24">nothing was measured</text>')


def _finite(points: Sequence[Point], log_y: bool) -> list[Point]:
    return [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b) and (b > 0 or not log_y)]


def _text_width(text: str) -> int:
    """About the width of 12-pixel text; Han characters are square."""
    return sum(12 if ord(c) > 0x2E7F else 7 for c in text)


def _short(label: str, width: float) -> str:
    cut = label
    while cut and _text_width(cut) > width - 16:
        cut = cut[:-1]
    return escape(cut if cut == label else cut[:-1] + "…")
