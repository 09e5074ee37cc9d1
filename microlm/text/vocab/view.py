"""How a text is cut, for the eye. Enters: a text and its `Cut`. Leaves: parts in a row, or rich text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from microlm.text.vocab.peers import Cut

if TYPE_CHECKING:
    from rich.text import Text

Kind = Literal["token", "unknown", "dropped"]
TONES = 5
_BACKGROUNDS = ("cyan", "green", "yellow", "magenta", "blue")


class Part(NamedTuple):
    """Characters of a text, and how many tokens they take: 1, several for a rare character, or none."""

    text: str
    tokens: int
    kind: Kind


def parts(text: str, cut: Cut) -> list[Part]:
    """The whole text: tokens that share a character are one part, what no token covers is dropped."""
    found: list[Part] = []
    at = 0
    first, tokens, is_unknown = 0, 0, False

    def close() -> None:
        if tokens:
            found.append(Part(text[first:at], tokens, "unknown" if is_unknown else "token"))

    for (start, end), unknown in zip(cut.spans, cut.unknown, strict=True):
        if start >= at or not tokens:
            close()
            if start > at:
                found.append(Part(text[at:start], 0, "dropped"))
            first, tokens, is_unknown = max(start, at), 0, False
        tokens, is_unknown, at = tokens + 1, is_unknown or unknown, max(at, end)
    close()
    if at < len(text):
        found.append(Part(text[at:], 0, "dropped"))
    return found


def lost_characters(text: str, cut: Cut) -> int:
    """Characters that the ids cannot give back: under an unknown token, or dropped and not white space."""
    return sum(
        len(p.text) if p.kind == "unknown" else sum(not c.isspace() for c in p.text)
        for p in parts(text, cut)
        if p.kind != "token"
    )


def shown(part: Part) -> str:
    """A part on a screen: control characters are shown, a character of several tokens has their number."""
    text = "".join(_visible(c) for c in part.text)
    return f"{text}{_small(part.tokens)}" if part.tokens > 1 else text


def coloured(row: list[Part]) -> Text:
    """The parts in alternating colours; unknown ones white on red, dropped ones struck out."""
    from rich.text import Text

    text, tone = Text(), 0
    for part in row:
        if part.kind == "token":
            style = f"black on {_BACKGROUNDS[tone % TONES]}"
        else:
            style = "white on red" if part.kind == "unknown" else "strike dim"
        tone += part.kind == "token"
        text.append(shown(part), style=style)
        if part.text.endswith("\n"):
            text.append("\n")
    return text


def _visible(character: str) -> str:
    if character == "\n":
        return "↵"
    if character == "\t":
        return "⇥"
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _small(number: int) -> str:
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(number))
