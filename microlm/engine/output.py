"""Ids of one answer → text as it becomes whole: no half characters, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from microlm.text.tokenizer import Tokenizer


class TextStream:
    """Decodes ids one by one and looks for stop strings, which may lie across any number of tokens.

    The stop string that ends first counts, of several the longest: where tokens end changes nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.stream()
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain now; a beginning of a stop string is held back until it is decided."""
        new = self._decoder.push(token_id)
        if not self._stop or not new:
            return new
        text = self._held + new
        ends = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when the answer ended otherwise; an incomplete last character is dropped."""
        rest, self._held = self._held + self._decoder.finish(), ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0
