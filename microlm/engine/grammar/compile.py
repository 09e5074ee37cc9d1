"""Constraints → matchers. What was compiled is kept; any thread may ask."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import llguidance

from microlm.core.errors import UserError
from microlm.core.records import Constraint
from microlm.engine.grammar.limits import parser_limits
from microlm.engine.grammar.masks import Masks, Matcher, Worker
from microlm.engine.grammar.source import source_of
from microlm.engine.grammar.vocabulary import vocabulary
from microlm.text.tokenizer import Tokenizer

KEPT_CHARS = 1 << 18
"""Of the constraints whose grammars are kept, the last used ones; one costs at most some 600 bytes."""


@dataclass(frozen=True, slots=True)
class Stats:
    """How often a grammar was compiled, how often one was there already, and the seconds of all compiling."""

    compiled: int = 0
    hits: int = 0
    compile_s: float = 0.0


@dataclass(slots=True)
class _Entry:
    """A constraint that is compiled once, by the first who asks."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    matcher: llguidance.LLMatcher | None = None


class Grammars:
    """Compiles constraints for one vocabulary, keeps them, and computes masks for many requests at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocabulary = vocabulary(tokenizer)
        self._vocab_size = tokenizer.vocab_size
        self._brace = tokenizer.encode("{")[0]
        self._worker = Worker(tokenizer.vocab_size)
        self._entries: OrderedDict[Constraint, _Entry] = OrderedDict()
        self._chars = 0
        self._lock = threading.Lock()
        self._stats = Stats()

    @property
    def stats(self) -> Stats:
        """What was compiled so far."""
        return self._stats

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of an answer; a UserError says what is wrong with the constraint."""
        with self._lock:
            entry = self._entry(constraint)
        with entry.lock:
            if entry.matcher is None:
                started = time.perf_counter()
                try:
                    entry.matcher = self._compile(constraint)
                except UserError:
                    self._forget(constraint)
                    raise
                self._count(1, 0, time.perf_counter() - started)
            else:
                self._count(0, 1, 0.0)
            return Matcher(entry.matcher.deep_copy(), self._vocabulary, self._vocab_size)

    def begin(self, matchers: Sequence[Matcher]) -> Masks:
        """Start to compute which ids may come next; `wait` of what comes back gives them."""
        return self._worker.begin(matchers)

    def _entry(self, constraint: Constraint) -> _Entry:
        """The entry of a constraint; the least recently used ones give way to a new one."""
        if constraint not in self._entries:
            self._entries[constraint] = _Entry()
            self._chars += _size(constraint)
            while self._chars > KEPT_CHARS and len(self._entries) > 1:
                self._chars -= _size(self._entries.popitem(last=False)[0])
        self._entries.move_to_end(constraint)
        return self._entries[constraint]

    def _forget(self, constraint: Constraint) -> None:
        with self._lock:
            if self._entries.pop(constraint, None):
                self._chars -= _size(constraint)

    def _count(self, compiled: int, hits: int, seconds: float) -> None:
        with self._lock:
            was = self._stats
            self._stats = replace(
                was,
                compiled=was.compiled + compiled,
                hits=was.hits + hits,
                compile_s=was.compile_s + seconds,
            )

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        source, limits = source_of(constraint), parser_limits()
        matcher = llguidance.LLMatcher(self._vocabulary, source, log_level=0, limits=limits)
        probe = Matcher(matcher.deep_copy(), self._vocabulary, self._vocab_size)
        allowed = probe.allowed()  # that nothing satisfies a grammar shows only here …
        if allowed[self._brace] and probe.consume(self._brace):
            probe.allowed()  # … and that an object has too many properties only there
        if allowed.any() and not probe.error:
            return matcher
        reason = probe.error or "nothing satisfies it"
        if constraint.kind != "grammar":  # line and column are of a grammar that the user did not write
            reason = re.sub(r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?", "", reason)
        raise UserError(f"{constraint.kind}: cannot be used to constrain the output: {reason}; simplify it")


def _size(constraint: Constraint) -> int:
    return len(constraint.value) + len(constraint.copy_from or "")
