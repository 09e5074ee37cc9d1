"""Train, validation and test by content. Enters: a record's digest. Leaves: the name of its split.

The split depends on nothing but the content: not on the seed, the order or what else is in the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Document, Extraction
from microlm.text.dedup import DigestSet, record_digest
from microlm.text.read import read_records

Split = Literal["train", "validation", "test"]
_SCALE = 1 << 32


def split_of(digest: bytes, validation_share: float, test_share: float) -> Split:
    """The split of a record, from bytes of its digest that the digest set does not place it by."""
    point = int.from_bytes(digest[8:12], "big") / _SCALE
    if point < validation_share:
        return "validation"
    return "test" if point < validation_share + test_share else "train"


def check_shares(validation_share: float, test_share: float) -> None:
    """Refuse shares that leave nothing to train on."""
    if validation_share + test_share >= 1:
        raise UserError(
            f"data: validation_share {validation_share} and test_share {test_share} leave nothing to train on; lower them"
        )


def leakage(files: Mapping[str, Path], kind: type[Document] | type[Conversation] | type[Extraction]) -> int:
    """How many training records of the written files say the same as a held-out one, by digest. Must be 0."""
    held_out = DigestSet()
    for name, path in files.items():
        if name != "train":
            add_all(held_out, read_records(path, kind))
    if not len(held_out):
        return 0
    return sum(record_digest(r) in held_out for r in read_records(files["train"], kind))


def add_all(digests: DigestSet, records: Iterable[Document | Conversation | Extraction]) -> None:
    """Put the digest of every record into the set."""
    for record in records:
        digests.add(record_digest(record))
