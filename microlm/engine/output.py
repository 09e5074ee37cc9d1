"""Ids of one answer → text as it becomes whole: no half characters, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from microlm.text.tokenizer import Tokenizer


class TextStream:
    """Decodes ids one by one and looks for stop strings, which may lie across any number of tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.stream()
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain now; a beginning of a stop string is held back until it is decided."""
        new = self._decoder.push(token_id)
        if not self._stop:
            return new
        return self._release(new) if new else ""

    def finish(self) -> str:
        """What was held back, when the answer ended otherwise."""
        if self.stopped:
            return ""
        rest = self._release(self._decoder.finish())
        if self.stopped:
            return rest
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0
