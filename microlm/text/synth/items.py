"""What is asked of an endpoint, one by one, and when two of them are the same.

Enters: turns, a template. Leaves: items and their digests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microlm.core.records import Conversation, Message, words_of
from microlm.text.clean import normalised
from microlm.text.dedup import digest
from microlm.text.synth.recipe import Template

_IN_NUMBER = re.compile(r"(?<=\d)\s*[^\w]\s*(?=\d)|(?<!\w)-(?=\d)")
_PRIVATE = 0xE100  # private use: normalisation leaves it alone
UNREAD = "(no seed)"  # in the place of a template's name
_BETWEEN = "\ue000"


@dataclass(frozen=True, slots=True)
class Item:
    """One conversation that is asked for."""

    number: int
    id: str
    template: Template
    fields: Mapping[str, Any]
    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """One that cannot be asked for, or was before."""

    number: int
    id: str
    template: str
    reason: str
    detail: str
    messages: tuple[Message, ...] = ()


def said_digest(text: str) -> bytes:
    """`dedup.digest`, but 1.5 is not 15, nor 3 - 4 the same as 34: signs between digits count."""
    return digest(_IN_NUMBER.sub(_kept, normalised("NFKC", text)))


def conversation_digest(conversation: Conversation) -> bytes:
    """The digest of all turns."""
    return said_digest(_BETWEEN.join(_parts(conversation.messages)))


def _parts(messages: Sequence[Message]) -> list[str]:
    return [part for turn in messages for part in (turn.role, *words_of(turn))]


def _kept(match: re.Match[str]) -> str:
    return "".join(chr(_PRIVATE + ord(c) % 0x1000) for c in match[0].strip() or " ")


def request_digest(messages: Sequence[Message], template: Template, tools: Sequence[str] = ()) -> bytes:
    """Of what is asked: the turns, the tools, and the schema that the answer must fit."""
    parts = [*tools, *_parts(messages)]
    if template.json_schema is not None:
        parts.append(json.dumps(template.json_schema, sort_keys=True))
    return said_digest(_BETWEEN.join(parts))
