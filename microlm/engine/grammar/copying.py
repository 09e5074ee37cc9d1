"""The copy grammar: terminals that match what stands in a text. Enters: the text; leaves: lines of Lark.

`llguidance` builds the suffix automaton (`substring_chunks`): any run of neighbouring chunks matches. A chunk
is a character, or a word, so that no copy begins or ends inside of one; in JSON it is escaped as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

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
        self._chunks = _WORD.findall(text) if words else list(text)
        self._words = words
        self._quoted = quoted
        parts = [_escaped(c) for c in self._chunks] if quoted else self._chunks
        chunks = json.dumps({"substring_chunks": parts}, ensure_ascii=False)
        self.lines = [f"COPY_TEXT: %regex {chunks}"]
        self._names: dict[object, str] = {}

    def terminal(self, shortest: int, longest: int | None, without: Collection[str] = ()) -> str | None:
        """The name of a terminal: copies of so many characters, but not those `without`; None: there is none.

        A copy is never empty. `without` are whole values, such as the names that an object has already.
        """
        shortest = max(shortest, 1)
        if not self._some(shortest, longest, frozenset(without)):
            return None
        key = (shortest, longest, tuple(without))
        if key not in self._names:
            self._names[key] = f"COPY_{len(self._names)}"
            self.lines.append(f"{self._names[key]}: {self._definition(shortest, longest, without)}")
        return self._names[key]

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

    def _some(self, shortest: int, longest: int | None, without: frozenset[str]) -> bool:
        """Whether there is such a copy."""
        left = sum(map(len, self._chunks))
        for first, chunk in enumerate(self._chunks):
            if left < shortest:
                return False
            left -= len(chunk)
            if self._words and _is_blank(chunk):
                continue
            length = 0
            for last in range(first, len(self._chunks)):
                length += len(self._chunks[last])
                if longest is not None and length > longest:
                    break
                if length < shortest or (self._words and _is_blank(self._chunks[last])):
                    continue
                if "".join(self._chunks[first : last + 1]) not in without:
                    return True
        return False


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
