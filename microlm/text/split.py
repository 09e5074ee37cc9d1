"""Train, validation and test by content. Enters: records and digests. Leaves: a JSONL file a kind and split.

A record's split depends on what it says alone: not on the seed, the order or the rest of the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.core.records import Conversation, Document, Extraction, Preference, to_json
from microlm.text.dedup import DigestSet, record_digest
from microlm.text.read import Record, read_records

Split = Literal["train", "validation", "test"]
Kind = Literal["documents", "conversations", "extraction", "preferences"]
TYPES: Mapping[Kind, type[Any]] = {
    "documents": Document,
    "conversations": Conversation,
    "extraction": Extraction,
    "preferences": Preference,
}
SPLITS: Mapping[Kind, tuple[Split, ...]] = {
    "documents": ("train", "validation", "test"),
    "conversations": ("train", "validation"),
    "extraction": ("train", "test"),
    "preferences": ("train", "validation"),
}
KINDS: tuple[Kind, ...] = tuple(TYPES)
_SCALE = 1 << 32


def kind_of(record: Record) -> Kind:
    """The kind of file a record belongs to."""
    return next(kind for kind, cls in TYPES.items() if isinstance(record, cls))


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
            f"data: validation_share {validation_share} and test_share {test_share} leave nothing to train on"
            "; lower them"
        )


def place(root: Path, kind: Kind, split: Split) -> Path:
    """Where the records of a kind and split lie."""
    return root / kind / f"{split}.jsonl"


def line_of(record: Record) -> str:
    """A record as its JSON line (the most frequent kinds are spared dataclasses.asdict)."""
    data: dict[str, Any]
    if isinstance(record, Document):
        data = {"text": record.text, "source": record.source, "licence": record.licence}
    elif isinstance(record, Conversation) and _of_words_alone(record):
        messages = [{"role": m.role, "content": m.content} for m in record.messages]
        data = {"messages": messages, "task": record.task, "source": record.source, "licence": record.licence}
    else:
        data = to_json(record)
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n"


def _of_words_alone(chat: Conversation) -> bool:
    return not (chat.tools or any(m.reasoning or m.tool_calls for m in chat.messages))


def records_of(root: Path, kind: Kind, split: Split) -> Iterator[Any]:
    """The records of a kind and split, as written."""
    return read_records(place(root, kind, split), TYPES[kind])


def rewrite(root: Path, kind: Kind, split: Split, change: Callable[[Any], Any | None]) -> None:
    """Put `change(record)` in the place of every record of a file, in order; None takes it out."""
    path = place(root, kind, split)
    fresh = path.with_suffix(".part")
    with (
        storage.explain_write(fresh),
        path.open(encoding="utf-8", newline="\n") as old,
        fresh.open("w", encoding="utf-8", newline="\n") as new,
    ):
        for line, record in zip(old, records_of(root, kind, split), strict=True):
            changed = change(record)
            if changed is not None:
                new.write(line if changed is record else line_of(changed))
        fresh.replace(path)


def held_out_digests(root: Path, kind: Kind) -> DigestSet:
    """The digests of the records of a kind that must not be trained on."""
    held_out = DigestSet()
    for split in SPLITS[kind]:
        if split != "train":
            for record in records_of(root, kind, split):
                held_out.add(record_digest(record))
    return held_out
