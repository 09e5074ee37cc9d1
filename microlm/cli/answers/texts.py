"""Text in from the user's files, text out to a terminal."""

from __future__ import annotations

from pathlib import Path

from microlm.core.errors import UserError


def printable(text: str) -> str:
    """Text without the control characters that would steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) >= 0xA0 else "�" for c in text)


def read_text(path: Path) -> str:
    """A UTF-8 file of the user's."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check the path") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
