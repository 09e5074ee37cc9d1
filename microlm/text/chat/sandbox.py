"""Jinja of strangers: rendered in a process of its own, with little memory, little time and no files.

Enters: a template's text and variables. Leaves: the rendered text and the places of `{% generation %}` in it,
or a `TemplateFault` with the line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from microlm.core import runtime
from microlm.text.chat import renderer

MAX_SOURCE = 1_000_000
MEMORY_BYTES, MEMORY_PER_CHAR = 256 << 20, 256
"""Address space of the process; more for each character of the conversation."""
SECONDS, CHARS_PER_SECOND = 3, 100_000
"""CPU time of a rendering; a second more for so many characters."""
LONGEST, LONGEST_PER_CHAR = 10_000_000, 20
"""Characters that a rendering may have."""


class TemplateFault(Exception):
    """Why a template does not render; `line` is where, 0 where that is not known."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


class Compiled:
    """A template ready to render; renderings of one template go one after another."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateFault(f"it has {len(source)} characters, at most {MAX_SOURCE} are read", 0)
        self._source = source
        self._lock = threading.Lock()
        self._child: _Child | None = None
        with self._lock:
            self._ready()

    def render(self, variables: Mapping[str, Any], size: int) -> tuple[str, list[tuple[int, int]]]:
        """The text, and its `{% generation %}` blocks; `size` is how many characters the conversation has.

        The variables are what JSON can say.
        """
        request = {"variables": dict(variables), "longest": LONGEST + LONGEST_PER_CHAR * size}
        with self._lock:
            answer = self._ask(self._ready(), request, size)
        return answer["text"], [(start, end) for start, end in answer["blocks"]]

    def _ready(self) -> _Child:
        """The process that has compiled the template; another one where it died, or is the parent's."""
        if self._child is None or self._child.owner != os.getpid():
            self._child = child = _start()
            weakref.finalize(self, _stop, child)
            self._ask(child, {"source": self._source}, len(self._source))
        return self._child

    def _ask(self, child: _Child, request: dict[str, Any], size: int) -> dict[str, Any]:
        seconds = SECONDS + size // CHARS_PER_SECOND
        memory = MEMORY_BYTES + MEMORY_PER_CHAR * size
        try:
            renderer.write_frame(child.stdin, request | {"memory_bytes": memory, "seconds": seconds})
            answer: dict[str, Any] = renderer.read_frame(child.stdout)
        except (EOFError, BrokenPipeError):
            self._child = None
            raise TemplateFault(f"the sandbox refuses it: {_death(child, memory, seconds)}", 0) from None
        except BaseException:  # Ctrl-C: what comes next would be the answer to this
            self._child = None
            _stop(child)
            raise
        if "reason" in answer:
            raise TemplateFault(answer["reason"], answer["line"])
        return answer


class _Child(NamedTuple):
    """A process that renders, and which process may talk to it."""

    process: subprocess.Popen[bytes]
    owner: int

    @property
    def stdin(self) -> Any:
        """Where requests go."""
        return self.process.stdin

    @property
    def stdout(self) -> Any:
        """Where answers come from."""
        return self.process.stdout

    @property
    def stderr(self) -> Any:
        """What Python says of its end."""
        return self.process.stderr


def _start() -> _Child:
    command = [sys.executable, "-P", renderer.__file__]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,  # what Python says before it dies
        env=runtime.bare_env(),
        start_new_session=True,  # a Ctrl-C in the terminal is not for it
    )
    return _Child(process, os.getpid())


def _stop(child: _Child) -> None:
    """End the process, if it is ours."""
    if child.owner != os.getpid():
        return
    child.process.kill()
    child.process.wait()
    for file in (child.stdin, child.stdout, child.stderr):
        with suppress(OSError):  # what it did not read any more
            file.close()


def _death(child: _Child, memory: int, seconds: int) -> str:
    """What the process died of."""
    code = child.process.wait()
    said = child.stderr.read().decode(errors="replace").strip()
    _stop(child)
    if code == -signal.SIGXCPU:
        return f"it takes more than {seconds} s"
    last = said.rpartition("\n")[2][:200] or f"exit status {code}"
    return f"it takes more than {memory >> 20} MB, or breaks Python ({last})"
