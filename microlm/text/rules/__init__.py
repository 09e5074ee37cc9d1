"""The rules of cleaning: pure functions `Document → (Document, reason | None)`, an edit or why to drop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from microlm.core.records import Document

Rule = Callable[[Document], tuple[Document, str | None]]


def edited(document: Document, text: str) -> Document:
    """The document with this text; the same object if nothing changed."""
    return document if text == document.text else replace(document, text=text)
