"""The copy grammar: terminals that match what stands in a text. Enters: the text; leaves: lines of Lark.

`llguidance` builds the suffix automaton (`substring_chunks`): any run of neighbouring chunks matches. A chunk
is a character, or a word, so that no copy begins or ends inside of one; in JSON it is escaped as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

import numpy as np

from microlm.core.errors import UserError
from microlm.engine.grammar.limits import MAX_COPY_CHARS, check_size

# Scripts that write words without spaces (Thai to Myanmar, Khmer, Chinese …), and Korean, go by character.
_WORD = re.compile(r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\U0010ffff]+|[\s\S]")
_RAW = (r"[\s\S]", r"[^\s\x00-\x1f]")
_QUOTED = (r'(?:\\u[0-9a-f]{4}|\\[^u]|[^\\"])', r'(?:\\["\\]|[^\\"\s])')
"""One character of a copy, and one that is no space or control: as it is, and inside of a JSON string."""


class Copies:
    """The terminals of what may be copied from a text; `lines` are their definitions."""

    def __init__(self, text: str, *, words: bool, quoted: bool) -> None:
        check_size("copy_from", text, MAX_COPY_CHARS)
        chunks = _WORD.findall(text) if words else list(text)
        self._text = text
        self._words = words
        self._quoted = quoted
        self._find_ends(chunks)
        parts = [_escaped(c) for c in chunks] if quoted else chunks
        automaton = json.dumps({"substring_chunks": parts}, ensure_ascii=False)
        self.lines = [f"COPY_TEXT: %regex {automaton}"]
        self._names: dict[object, str | None] = {}
        self._known_times: dict[str, int] = {}

    def terminal(self, shortest: int, longest: int | None, without: Collection[str] = ()) -> str | None:
        """The name of a terminal: copies of so many characters, but not those `without`; None: there is none.

        A copy is never empty. `without` are whole values, such as the names that an object has already.
        """
        shortest = max(shortest, 1)
        key = (shortest, longest, tuple(without))
        if key not in self._names:
            name = f"COPY_{len(self._names)}" if self._some(shortest, longest, set(without)) else None
            self._names[key] = name
            if name is not None:
                self.lines.append(f"{name}: {self._definition(shortest, longest, without)}")
        return self._names[key]

    def _find_ends(self, chunks: list[str]) -> None:
        """Where copies may start and end, by characters: `_ends_until[i]` ends are at i or before it."""
        solid = np.array([not (self._words and _is_blank(c)) for c in chunks], dtype=np.bool_)
        ends = np.cumsum([len(c) for c in chunks], dtype=np.int64)
        self._starts = np.append(0, ends[:-1])[solid] if chunks else ends
        places = np.zeros((2, len(self._text) + 1), dtype=np.bool_)
        places[0, self._starts] = places[1, ends[solid]] = True
        self._is_start, self._is_end = places[0].tobytes(), places[1].tobytes()
        self._ends_until = places[1].cumsum()

    def _definition(self, shortest: int, longest: int | None, without: Collection[str]) -> str:
        any_char, solid = _QUOTED if self._quoted else _RAW
        most = "" if longest is None else longest
        parts = ["COPY_TEXT", f"/{any_char}{{{shortest},{most}}}/"]
        if self._words:
            parts.append(f"/{solid}(?:{any_char}*{solid})?/")
        taken = [json.dumps(_escaped(w) if self._quoted else w, ensure_ascii=False) for w in without]
        if taken:
            parts.append(f"~({' | '.join(taken)})")
        inner = " & ".join(parts)
        return rf'"\"" ({inner}) "\""' if self._quoted else inner

    def _some(self, shortest: int, longest: int | None, without: Collection[str]) -> bool:
        """Whether there is such a copy: whether the text has more of that length than those `without`."""
        size = len(self._text)
        last = size if longest is None else np.minimum(self._starts + longest, size)
        before = np.minimum(self._starts + shortest - 1, size)
        copies = int((self._ends_until[last] - self._ends_until[before]).sum())
        taken = [w for w in without if shortest <= len(w) and (longest is None or len(w) <= longest)]
        return copies > sum(map(self._times, taken))

    def _times(self, word: str) -> int:
        """How often a word is copied from the text."""
        if word not in self._known_times:
            times, at = 0, self._text.find(word)
            while at >= 0:
                times += self._is_start[at] and self._is_end[at + len(word)]
                at = self._text.find(word, at + 1)
            self._known_times[word] = times
        return self._known_times[word]


def _is_blank(chunk: str) -> bool:
    return chunk.isspace() or chunk < " "


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def no_copy(shortest: int, longest: int | None, place: str) -> UserError:
    """What to say where the text has nothing to copy."""
    most = "any number of" if longest is None else f"at most {longest}"
    return UserError(
        f"{place}: the text to copy from holds nothing of at least {max(shortest, 1)} and {most} characters; "
        "widen the bounds or give another text"
    )
