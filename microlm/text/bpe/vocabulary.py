"""What a `tokenizer.json` says, checked: tokens and their ids, merges, added tokens.

Enters: a file of anyone's making. Leaves: a `Vocabulary` whose ids are unique and whose merges are known,
or one sentence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.core.errors import UserError

MAX_ID = (1 << 21) - 1
"""Above this an id is a fault of the file: no vocabulary in use has a tenth of it."""
SHOWN = 40  # characters of a token in a message


@dataclass(frozen=True, slots=True)
class Added:
    """A token that stands outside the merges; a special one is left out when ids become text."""

    id: int
    content: str
    special: bool


@dataclass(frozen=True)
class Vocabulary:
    """`ids` of the model's tokens (as they are written in the file), merges in order, added tokens."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    added: tuple[Added, ...]
    settings: dict[str, Any]
    """The file without tokens, merges and added tokens: `model`, `normalizer`, `pre_tokenizer` …"""

    @property
    def size(self) -> int:
        """The highest id and one."""
        return 1 + max([*self.ids.values(), *(t.id for t in self.added)], default=-1)

    def number(self, token: str) -> int:
        """The id of a token that is there."""
        if token in self.ids:
            return self.ids[token]
        return next(t.id for t in self.added if t.content == token)


def _byte_alphabet() -> dict[str, int]:
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTE_OF = _byte_alphabet()
"""GPT-2's printable stand-in character of every byte → the byte."""


class Unsupported(Exception):
    """Why a vocabulary is not compiled."""


class _Fault(Exception):
    """What is wrong with the file."""


def read(file: Path) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`; any fault is a UserError with the file's name."""
    try:
        data = json.loads(file.read_bytes().decode("utf-8"))
        return _check(_object(data, "the file"))
    except _Fault as fault:
        problem = str(fault)
    except UnicodeDecodeError as e:
        problem = f"byte {e.start} is not UTF-8"
    except (ValueError, RecursionError) as e:
        problem = "nested too deeply" if isinstance(e, RecursionError) else str(e)[:120]
    except OSError as e:
        problem = f"cannot be read ({e.strerror})"
    raise UserError(f"{file}: not a tokenizer file ({problem}); make it again")


def _check(data: dict[str, Any]) -> Vocabulary:
    model = _object(data.get("model"), "model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    ids = _ids(model.get("vocab"), kind)
    added = _added(data.get("added_tokens") or [], ids)
    settings = {k: v for k, v in data.items() if k != "added_tokens"}
    settings["model"] = {k: v for k, v in model.items() if k not in ("vocab", "merges")} | {"type": kind}
    merges = _merges(model, ids) if kind == "BPE" else []
    made = {left + right for left, right in merges}
    for token in added:
        if token.special and token.content in made:
            raise _Fault(f"a merge makes the control token {_shown(token.content)} out of plain text")
    return Vocabulary(ids, merges, added, settings)


def _ids(vocab: Any, kind: Any) -> dict[str, int]:
    """Token → id; `unigram` lists its tokens in the order of the ids."""
    if kind == "Unigram":
        rows = _list(vocab, "model.vocab")
        tokens = [_string(row[0] if isinstance(row, list) and row else None, "model.vocab") for row in rows]
        ids = {token: number for number, token in enumerate(tokens)}
        if len(ids) < len(tokens):
            raise _Fault("a token is in model.vocab twice")
        return ids
    ids = _object(vocab, "model.vocab")
    for token, number in ids.items():
        _id(number, token)
    if len(set(ids.values())) < len(ids):
        raise _Fault("two tokens of model.vocab have the same id")
    return ids


def _added(rows: Any, ids: dict[str, int]) -> tuple[Added, ...]:
    names = {number: token for token, number in ids.items()}
    found: dict[str, Added] = {}
    for row in _list(rows, "added_tokens"):
        row = _object(row, "an added token")
        content = _string(row.get("content"), "an added token's content")
        number = _id(row.get("id"), content)
        if content in found:
            raise _Fault(f"the added token {_shown(content)} is there twice")
        if names.setdefault(number, content) != content or ids.get(content, number) != number:
            raise _Fault(f"id {number} of the added token {_shown(content)} is not its own")
        special = row.get("special", False)
        if not isinstance(special, bool):
            raise _Fault(f"special of the added token {_shown(content)} is not true or false")
        found[content] = Added(number, content, special)
    return tuple(found.values())


def _merges(model: dict[str, Any], ids: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    mark = model.get("continuing_subword_prefix") or ""
    if not isinstance(mark, str):
        raise _Fault("model.continuing_subword_prefix is not a text")
    prefix = len(mark)
    for row in _list(model.get("merges"), "model.merges"):
        pair = row.split(" ") if isinstance(row, str) else row
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise _Fault(f"merge {len(merges)} is not a pair of tokens")
        left, right = pair
        for token in (left, right, left + right[prefix:]):
            if token not in ids:
                raise _Fault(f"merge {len(merges)} names {_shown(token)}, which is not in model.vocab")
        merges.append((left, right))
    return merges


def _id(number: Any, token: str) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= MAX_ID:
        raise _Fault(f"the id of {_shown(token)} is not a whole number from 0 to {MAX_ID}")
    return number


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Fault(f"{place}: expected an object, found {type(value).__name__}")
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Fault(f"{place}: expected a list, found {type(value).__name__}")
    return value


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise _Fault(f"{place}: expected a text, found {type(value).__name__}")
    return value


def _shown(token: str) -> str:
    return ascii(token if len(token) <= SHOWN else token[:SHOWN] + "…")
