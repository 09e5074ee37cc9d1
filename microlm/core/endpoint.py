"""Where an endpoint is and what opens it: address, API key. Enter: a user's words; leave: checked values."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from urllib.parse import urlsplit

from microlm.core import runtime
from microlm.core.errors import UserError

KEY_VARIABLE = "MICROLM_API_KEY"


def root_url(base_url: str) -> str:
    """`http://host:port[/path]` without a trailing `/v1`; anything else is an error sentence."""
    url = base_url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"'{base_url}': not an address; expected a URL such as http://127.0.0.1:8000")
    return url


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_key(file: Path | None) -> str | None:
    """The API key from a file, else from MICROLM_API_KEY; None when neither is given."""
    place = KEY_VARIABLE
    key = runtime.env(KEY_VARIABLE)
    if file is not None:
        place = str(file)
        try:
            key = file.read_text(encoding="utf-8").strip()
        except OSError as e:
            raise UserError(
                f"{file}: the API key cannot be read ({e.strerror}); write it into this file"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{file}: is not UTF-8 text; write the API key into it, on one line") from None
        if not key:
            raise UserError(f"{file}: is empty; write the API key into it, on one line")
    if key and not re.fullmatch(r"[\x21-\x7e]{1,512}", key):
        raise UserError(
            f"{place}: the API key is not one line of at most 512 visible ASCII characters; make such a key"
        )
    return key or None
