"""Held-out texts by domain, on which tokenizers are measured.

Enters: a user's files, a data artifact's validation split, or the short samples that come with MicroLM.
Leaves: domain → texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from microlm.core.artifact import Artifact
from microlm.core.errors import UserError
from microlm.core.records import Conversation, Document, Extraction
from microlm.text import extraction
from microlm.text.read import Drop, read_records, texts_of
from microlm.text.sources import blocks, parse, read_block
from microlm.text.sources.files import SUFFIXES, suffix

Domains = dict[str, list[str]]
NAMES = ("modern Chinese", "classical Chinese", "English", "code", "JSON", "dialogue")
_CLASSICAL = re.compile("[之乎者也矣焉哉曰吾汝其於兮弗乃遂]")
_MODERN = re.compile("[的了是在这我们着吗呢个和]")
_HAN = re.compile("[\u4e00-\u9fff]")
_LATIN = re.compile("[A-Za-z]")
_CODE = re.compile(r"[{}();=<>\[\]_#$|\\]|\b(?:def|return|import|const|void|int|SELECT)\b")


def samples() -> Domains:
    """The texts that come with MicroLM: a few kilobytes a domain, written for it or in the public domain."""
    folder = resources.files("microlm.text.vocab").joinpath("samples")
    files = {name: folder.joinpath(f"{name.lower().replace(' ', '_')}.txt") for name in NAMES}
    return {name: file.read_text("utf-8").rstrip("\n").split("\n%%\n") for name, file in files.items()}


def of_words(words: Sequence[str], limit: int) -> Domains:
    """`NAME=FILE` of a user, each at most `limit` texts."""
    found: Domains = {}
    for word in words:
        name, sign, place = word.partition("=")
        if not sign or not name or not place:
            raise UserError(f"--domain '{word}': expected NAME=FILE, for example poems=held_out.jsonl")
        if name in found:
            raise UserError(f"--domain '{word}': domain '{name}' is there already; give it another name")
        found[name] = list(islice(texts_of_file(Path(place)), limit))
        if not found[name]:
            raise UserError(f"{place}: holds no text; choose another file for domain '{name}'")
    return found


def texts_of_file(path: Path) -> Iterator[str]:
    """The texts of a file by its ending: records of JSONL, CSV or Parquet, else every line of a text."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a .txt, .jsonl, .csv or .parquet file")
    kind = next((k for k in ("jsonl", "csv", "parquet") if suffix(path) in SUFFIXES[k]), "text")
    if kind == "text":
        yield from lines_of(path)
        return
    for block in blocks(parse(f"{kind}:{path}")):
        for record in read_block(block):
            if isinstance(record, Drop):
                raise UserError(f"{record.place}: {record.detail}; mend the line or leave it out")
            yield "\n".join(texts_of(record))


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text that are not empty."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: byte {e.start} is not UTF-8; save it as UTF-8") from None
    yield from (line for line in text.splitlines() if line.strip())


def of_data(data: Artifact, limit: int) -> Domains:
    """The validation texts of a data artifact, each in the domain that it looks like; empty ones left out."""
    found: Domains = {name: [] for name in NAMES}
    documents = (d.text for d in _records(data, "documents/validation.jsonl", Document))
    chats = (
        "\n".join(m.content for m in c.messages)
        for c in _records(data, "conversations/validation.jsonl", Conversation)
        if c.task != "extraction"
    )
    answers = (
        extraction.answer(r.relation, r.allowed or [t.relation for t in r.relation])
        for r in _records(data, "extraction/test.jsonl", Extraction)
    )
    for text in documents:
        texts = found[classify(text)]
        if len(texts) < limit:
            texts.append(text)
    found["dialogue"] += islice(chats, limit)
    found["JSON"] += islice(answers, limit - len(found["JSON"]))
    filled = {name: texts for name, texts in found.items() if texts}
    if not filled:
        raise UserError(f"{data.url}: no validation text in it; set the data stage's splits")
    return filled


def classify(text: str) -> str:
    """The domain that a document looks like: by its first character, its symbols, and its function words."""
    if text.lstrip()[:1] in ("{", "[") and text.rstrip()[-1:] in ("}", "]"):
        return "JSON"
    if len(_CODE.findall(text)) * 18 > len(text):
        return "code"
    if len(_HAN.findall(text)) * 3 < len(_LATIN.findall(text)):
        return "English"
    old, new = len(_CLASSICAL.findall(text)), len(_MODERN.findall(text))
    return "classical Chinese" if old > new else "modern Chinese"


def counts(domains: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Domain → UTF-8 bytes."""
    return {name: sum(len(t.encode()) for t in texts) for name, texts in domains.items()}


def _records(data: Artifact, name: str, kind: type[Any]) -> Iterator[Any]:
    """The records of one file; a corpus without this kind of data has no such file."""
    path = data.path / name
    return read_records(path, kind) if path.exists() else iter(())
