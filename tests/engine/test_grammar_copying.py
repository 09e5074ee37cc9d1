"""Whether a text holds anything to copy: what a search finds, and found soon in any text."""

from __future__ import annotations

import random
import re
import time
from contextlib import suppress
from typing import Any

import pytest

from microlm.core.errors import UserError
from microlm.engine.grammar.copied_schema import copied_schema
from microlm.engine.grammar.copying import Copies
from microlm.engine.grammar.limits import MAX_COPY_CHARS


@pytest.mark.parametrize("words", [False, True])
def test_whether_there_is_a_copy_equals_a_search(words: bool) -> None:
    draw = random.Random(1)
    for _ in range(1000):
        text = "".join(draw.choices("ab 李\n", k=draw.randrange(9)))
        low, high = draw.randrange(1, 5), draw.choice([None, 0, 1, 2, 4])
        most = len(text) if high is None else high
        without = {"".join(draw.choices("ab 李", k=draw.randrange(4))) for _ in range(draw.randrange(9))}
        chunks = re.findall(r"[ab]+|[\s\S]", text) if words else list(text)
        runs = [chunks[i:j] for i in range(len(chunks)) for j in range(i + 1, len(chunks) + 1)]
        found = {"".join(r) for r in runs if not words or (r[0].strip() and r[-1].strip())}
        expected = any(low <= len(copy) <= most and copy not in without for copy in found)
        name = Copies(text, words=words, quoted=True).terminal(low, high, tuple(without))
        assert (name is not None) == expected, (text, low, high, without)


def names_without_end() -> dict[str, Any]:
    """Objects whose names are all that a text holds but for some."""
    listed = [{"a" * k: True for k in range(1, 6)} | {f"b{i}": True} for i in range(300)]
    return {"anyOf": [{"type": "object", "properties": p, "propertyNames": {"maxLength": 5}} for p in listed]}


@pytest.mark.parametrize(
    "text, value",
    [
        ("李" * 16_000 + " " * 16_000, {"type": "string", "minLength": 16_001}),
        ("a" * MAX_COPY_CHARS, names_without_end()),
        ("a " * (MAX_COPY_CHARS // 2), names_without_end()),
    ],
)
def test_looking_for_copies_takes_no_long(text: str, value: dict[str, Any]) -> None:
    started = time.process_time()
    copies = Copies(text, words=True, quoted=True)
    with suppress(UserError):
        copied_schema(value, copies, {})
    assert time.process_time() - started < 1.0
