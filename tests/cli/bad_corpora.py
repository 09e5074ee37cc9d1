"""Broken corpora: what is dropped and counted, and what cannot go on."""

from __future__ import annotations

import gzip
import os
import random

import zstandard
from broken_house import CORPUS, LINES, Prepare, Room


def with_line(line: bytes) -> bytes:
    return b"\n".join([*LINES[:4], line, *LINES[4:]]) + b"\n"


def many() -> bytes:
    """Lines that do not pack well: three blocks of zstd."""
    drawn, letters = random.Random(0), [chr(c) for c in range(0x4E00, 0x9FA5)]
    rows = ("".join(drawn.choices(letters, k=400)) for _ in range(300))
    return b"".join(f'{{"text": "{row}"}}\n'.encode() for row in rows)


MANY = many()
LONG = b'{"text": "' + b"x" * (50 << 20) + b'"}'

# kind → (file name, bytes, reason of the drop)
COUNTED: dict[str, tuple[str, bytes, str]] = {
    "invalid UTF-8": ("c.jsonl", with_line(b'{"text": "\xe6\xff"}'), "invalid_utf8"),
    "lone surrogate, escaped": ("c.jsonl", with_line(b'{"text": "a\\ud800"}'), "lone_surrogate"),
    "lone surrogate, as bytes": ("c.jsonl", with_line(b'{"text": "\xed\xa0\x80"}'), "invalid_utf8"),
    "NUL": ("c.jsonl", with_line(b'{"text": "a\x00b"}'), "nul_byte"),
    "50 MB line": ("c.jsonl", with_line(LONG), "line_too_long"),
    "50 MB line, packed": ("c.jsonl.zst", zstandard.compress(with_line(LONG)), "line_too_long"),
    "half a JSON object": ("c.jsonl", with_line(b'{"text": "a'), "invalid_json"),
    "a list": ("c.jsonl", with_line(b'["a"]'), "not_an_object"),
    "wrong key": ("c.jsonl", with_line(b'{"txt": "a"}'), "missing_field:text (found txt)"),
    "wrong type": ("c.jsonl", with_line(b'{"text": 5}'), "text_not_a_string"),
    "null": ("c.jsonl", with_line(b'{"text": null}'), "text_null"),
    "unknown role": ("c.jsonl", with_line(b'{"messages": [{"role": "bot", "content": "x"}]}'), "bad_role"),
    "missing field of a message": (
        "c.jsonl",
        with_line(b'{"messages": [{"role": "user"}]}'),
        "missing_field:content (found role)",
    ),
    "half a gzip": (
        "c.jsonl.gz",
        gzip.compress(MANY, mtime=0)[: len(gzip.compress(MANY, mtime=0)) // 2],
        "truncated_file",
    ),
    "half a zst": (
        "c.jsonl.zst",
        zstandard.compress(MANY)[: len(zstandard.compress(MANY)) // 2],
        "truncated_file",
    ),
}


def two_sources(room: Room, first: bytes, second: bytes) -> list[str]:
    return room.corpus(
        first, "train.jsonl", source=["jsonl:train.jsonl", f"jsonl:{room.write('valid.jsonl', second)}"]
    )


def entities(room: Room, text: str) -> list[str]:
    return room.stage("data", entities=room.write("mine.jsonl", text))


# kind → (how to break it and what to call, what the sentence says: the place, and what is wrong)
CORPORA: dict[str, tuple[Prepare, str]] = {
    "empty file": (lambda r: r.corpus(b""), r"corpus\.jsonl: holds no records, the file is empty; "),
    "empty gzip": (lambda r: r.corpus(gzip.compress(b""), "c.jsonl.gz"), r"c\.jsonl\.gz: holds no records"),
    "UTF-16": (
        lambda r: r.corpus(CORPUS.decode().encode("utf-16")),
        r"corpus\.jsonl: is UTF-16; save it as UTF-8",
    ),
    "binary": (lambda r: r.corpus(os.urandom(4096)), r"corpus\.jsonl: looks like a binary file"),
    "a zip": (lambda r: r.corpus(b"PK\x03\x04xx"), r"corpus\.jsonl: is a zip archive; unpack it first"),
    "a JSON array": (
        lambda r: r.corpus(b'[{"text": "a"},\n{"text": "b"}]'),
        r"corpus\.jsonl: is not one JSON object",
    ),
    "wrong key everywhere": (
        lambda r: r.corpus(CORPUS.replace(b"text", b"body")),
        r"corpus\.jsonl:1: .*'text'.*rename the field",
    ),
    "field renamed between splits": (
        lambda r: two_sources(r, CORPUS, CORPUS.replace(b"text", b"content")),
        r"valid\.jsonl:1: .*rename the field",
    ),
    "strict": (lambda r: r.corpus(with_line(b"{"), strict=True), r"corpus\.jsonl:5: .*set strict: false"),
    "strict and half a gzip": (
        lambda r: r.corpus(gzip.compress(MANY, mtime=0)[:-9], "c.jsonl.gz", strict=True),
        r"c\.jsonl\.gz:\d+: .*fetch the file",
    ),
    "no such file": (
        lambda r: r.stage("data", source="jsonl:none.jsonl"),
        r"none\.jsonl: no such file; check",
    ),
    "a folder": (
        lambda r: r.stage("data", source="jsonl:runs"),
        r"runs: \d+ of \d+ records cannot be used, .*; mend",
    ),
    "a folder without texts": (lambda r: r.stage("data", source="text:runs"), r"runs: holds no \.txt"),
    "unknown extension": (
        lambda r: r.corpus(b"text\nx\n", "c.csv"),
        r"c\.csv: '\.csv' is not one of .*name it as csv:PATH",
    ),
    "unknown kind of source": (
        lambda r: r.stage("data", source="xls:a.xls"),
        r"data\.source 'xls:a\.xls': is not one of .*jsonl:.*NAME= before it names the task",
    ),
    "no source": (lambda r: r.stage("data", source=[]), r"data\.source: is an empty list; name at least one"),
    "a NUL in the name": (
        lambda r: r.stage("data", source="jsonl:a\0.jsonl"),
        r"a\\x00\.jsonl: .*; check the path",
    ),
    "a remote source": (
        lambda r: r.stage("data", source="jsonl:s3://b/a.jsonl"),
        r"s3://b/a\.jsonl.*download",
    ),
    "nothing is left": (
        lambda r: r.corpus(CORPUS, min_chars=99),
        r"data\.source: nothing is left of 9 records .*too_short 9.*; \w",
    ),
    "a binary text": (lambda r: r.corpus(b"\xff\x80" + b"x" * 99, "c.txt"), r"c\.txt: byte 0 is not UTF-8"),
    "entities: unknown topic": (
        lambda r: entities(r, '{"topic": "人", "name": "a", "facts": {"b": "c"}}'),
        r"mine\.jsonl:1: unknown topic '人'; did you mean '人物'",
    ),
    "entities: unknown relation": (
        lambda r: entities(r, '\n{"topic": "人物", "name": "a", "facts": {"出生": "c"}}'),
        r"mine\.jsonl:2: unknown relation '出生'; did you mean '出生",
    ),
    "entities: missing field": (
        lambda r: entities(r, '{"topic": "人物", "facts": {"b": "c"}}'),
        r"mine\.jsonl:1: key 'name' must be ",
    ),
    "entities: not JSON": (lambda r: entities(r, "李白"), r"mine\.jsonl:1: not a JSON object; expected"),
    "entities: missing": (
        lambda r: r.stage("data", entities="none.jsonl"),
        r"none\.jsonl: no such file; check",
    ),
    "entities: empty": (lambda r: entities(r, ""), r"mine\.jsonl: holds no entities; expected"),
}
