"""What is answered already, kept through any crash. Enters: an answer and its number; leaves: the answer.

One JSON line each, appended. A line that a crash cut off is cut away, and its item asked again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SYNC_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint said to one item, or why that cannot be used (`reason`).

    `model` is the endpoint's own word for it; `faults` are the reasons of the attempts before.
    """

    text: str = ""
    reason: str = ""
    detail: str = ""
    model: str = ""
    asked_model: str = ""
    seed: int = 0
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    faults: list[str] = field(default_factory=list)


class Journal:
    """Answers by item number: 8 bytes of memory an item, the rest on disk. Threads may add at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")
        self._at = array("q")
        self._one = threading.Lock()
        self.count = 0
        self.models: set[str] = set()  # that were asked before
        self._synced = time.monotonic()
        self._scan()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, number: int) -> bool:
        return number < len(self._at) and self._at[number] >= 0

    def add(self, number: int, answer: Answer) -> None:
        """Append an answer; a killed process keeps it, a dead machine may lose the last second's."""
        row = json.dumps({"number": number, **asdict(answer)}, ensure_ascii=False)
        with self._one:
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(row.encode() + b"\n")
            self._file.flush()
            self._note(number, start)
            if time.monotonic() - self._synced >= SYNC_EVERY_S:
                self._sync()

    def get(self, number: int) -> Answer | None:
        """The answer to an item, if there is one."""
        if number not in self:
            return None
        self._file.seek(self._at[number])
        return Answer(**_parse(self._file.readline())[1])

    def close(self) -> None:
        """Sync and close."""
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _scan(self) -> None:
        self._file.seek(0)
        start = 0
        while line := self._file.readline():
            try:
                number, fields = _parse(line)
                self.models.add(Answer(**fields).asked_model)
            except (ValueError, KeyError, TypeError):
                break
            self._note(number, start)
            start += len(line)
        self._file.truncate(start)

    def _note(self, number: int, start: int) -> None:
        if number >= len(self._at):
            self._at.extend([-1] * (number + 1 - len(self._at)))
        self.count += self._at[number] < 0
        self._at[number] = start


def _parse(line: bytes) -> tuple[int, dict[str, Any]]:
    """A line's number and fields; ValueError for one that is not whole."""
    if not line.endswith(b"\n"):
        raise ValueError("cut off")
    row = json.loads(line)
    number = row.pop("number")
    if not isinstance(number, int) or number < 0:
        raise ValueError("no number")
    return number, row
