"""A user's extraction records → training conversations: more lines in one of the prepared files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from microlm.core.records import Conversation, Message, to_json
from microlm.text import extraction
from microlm.text.sources import factbook
from microlm.text.split import records_of


def teach_extraction(root: Path) -> Iterator[Conversation]:
    """Append the user's training extraction as conversations, so that it is taught; yields each.

    The factbook's own records are left out: its conversations hold them already.
    """
    with (root / "conversations/train.jsonl").open("a", encoding="utf-8", newline="\n") as out:
        for record in records_of(root, "extraction", "train"):
            if record.source == factbook.SOURCE:
                continue
            asked = Message("user", extraction.prompt(record.text, record.allowed, record.lang))
            reply = Message("assistant", extraction.answer(record.relation, record.allowed))
            chat = Conversation((asked, reply), "extraction", record.source, record.licence)
            out.write(json.dumps(to_json(chat), ensure_ascii=False, separators=(",", ":")) + "\n")
            yield chat
