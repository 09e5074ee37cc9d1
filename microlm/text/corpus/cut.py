"""Long documents → pieces that end where a sentence ends."""

from __future__ import annotations

import re

_END = re.compile(r"\n+|[。！？；…]+[”’」』）】]*|[.!?][\"')\]]*(?=\s)")
"""Where a piece may end: a line break, or a full stop with what closes behind it."""


def cut(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` characters (0: no limit), cut behind the last sentence that fits."""
    if not limit or len(text) <= limit:
        return [text]
    pieces = []
    start = 0
    while len(text) - start > limit:
        end = start + _last_end(text[start : start + limit])
        pieces.append(text[start:end].strip())
        start = end
    pieces.append(text[start:].strip())
    return [p for p in pieces if p]


def _last_end(window: str) -> int:
    """Behind the last sentence of the window, or of its last comma or space, or all of it."""
    ends = [m.end() for m in _END.finditer(window)]
    if ends:
        return ends[-1]
    for marks in ("，、,", " "):
        at = max(window.rfind(mark) for mark in marks)
        if at > 0:
            return at + 1
    return len(window)
