"""Byte-level BPE: strings ↔ ids through an HF `tokenizer.json`. Control tokens in user text stay text.

A short text goes through `tokenizers`, many or long ones through our compiled encoder: the same ids.
"""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.text.bpe import vocabulary
from microlm.text.bpe.vocabulary import BYTE_OF, Unsupported, Vocabulary

if TYPE_CHECKING:
    from microlm.text.bpe.flat import Encoder

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What a tokenizer is made of in an HF directory; a foreign directory may lack all but the first."""

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, START, END)
"""The ids 0, 1, 2 of every tokenizer that we train; `<|im_end|>` is the one EOS of documents and turns."""
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""The ids after them: control tokens that are shown when ids become text, so that every engine shows them."""

COLD_CHARS = 2_000_000
"""From so many characters on the start of the compiled encoder (about a second) is worth its time …"""
WARM_CHARS = 1_000
"""… and from so many its use, once it is started."""
_BATCH_CHARS = 1 << 20  # encoded at once
Ids = NDArray[Any]
Ends = NDArray[np.int64]


def reserved(count: int) -> tuple[str, ...]:
    """The names of control tokens that a later stage may give a meaning."""
    return tuple(f"<|reserved_{i}|>" for i in range(count))


class Tokenizer:
    """A loaded tokenizer. Ids are ints below `vocab_size`; `control` has the id of every control token."""

    def __init__(self, inner: HFTokenizer, known: Vocabulary, path: Path) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._controlled = inner
        self._known = known
        self.path = path
        self.vocab_size: int = known.size
        self.dtype = np.dtype("<u2" if known.size <= 0xFFFF else "<u4")
        pad, start, end = self._own()
        own = {token: known.number(token) for token in (pad, start, end) if token}
        self.pad_id, self.eos_id = own[pad], own[end]
        self.start_id = own.get(start) if start else None
        self._asked = 0  # characters of many or long texts, so far
        self.control: dict[str, int] = {**{t.content: t.id for t in known.added}, **own}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer of an HF directory."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{path}: no tokenizer.json there; expected a Hugging Face directory")
        known = vocabulary.read(file)
        try:
            inner = HFTokenizer.from_file(str(file))
        except Exception as e:  # tokenizers raises bare Exception for every fault of the file
            raise UserError(f"{file}: not a tokenizer file ({str(e)[:120]}); make it again") from None
        for token in known.added:
            if inner.token_to_id(token.content) != token.id:
                raise UserError(
                    f"{file}: not a tokenizer file (the added token {token.content!r} is given the id "
                    f"{inner.token_to_id(token.content)}, not {token.id}); make it again"
                )
        return cls(inner, known, path)

    def _own(self) -> tuple[str, str | None, str]:
        """What pads, opens a turn, ends: ChatML's tokens, or (no turns) those that the directory names."""
        ids = self._controlled.token_to_id
        if None not in map(ids, SPECIAL):
            return SPECIAL
        from microlm.text.chat.directory import special_tokens  # that room reads tokenizers itself

        named = {name: token for name, token in special_tokens(self.path).items() if ids(token) is not None}
        end = named.get("eos_token")
        if end is None:
            raise UserError(
                f"{self.path}: the tokenizer lacks ChatML's control tokens and names no eos_token, "
                "so that no text would end; name one in tokenizer_config.json"
            )
        return named.get("pad_token", end), START if ids(START) is not None else None, end

    @property
    def has_chatml(self) -> bool:
        """Whether our own template's turns can be written with it."""
        return self.start_id is not None and self.control.get(END) == self.eos_id

    @cached_property
    def _plain(self) -> HFTokenizer:
        """`tokenizers` for text from users, in which it matches no added token, special or not."""
        inner = HFTokenizer.from_str(self._without_control_pieces(self._controlled.to_str()))
        inner.add_special_tokens([AddedToken(t.content, special=True) for t in self._known.added])
        inner.encode_special_tokens = True
        return inner

    def _without_control_pieces(self, description: str) -> str:
        """Unigram finds any of its pieces in a text: those of control tokens get names that are in none."""
        data = json.loads(description)
        if data["model"]["type"] != "Unigram":
            return description
        for token in self._known.added:
            data["model"]["vocab"][token.id][0] = f"\U0010fffe{token.id}"
        return json.dumps(data | {"added_tokens": []})

    @cached_property
    def _compiled(self) -> Encoder | str:
        """Our encoder, or the reason why there is none."""
        from microlm.text.bpe.flat import Encoder  # brings numba: half a second
        from microlm.text.compiled import IS_COMPILED

        if not IS_COMPILED:
            return "numba is not installed"
        try:
            return Encoder(self._known)
        except Unsupported as e:
            return str(e)

    @property
    def backend(self) -> Literal["compiled", "tokenizers"]:
        """What encodes many texts."""
        return "tokenizers" if isinstance(self._compiled, str) else "compiled"

    @property
    def backend_reason(self) -> str:
        """Why `tokenizers` encodes many texts, "" if our encoder does."""
        return self._compiled if isinstance(self._compiled, str) else ""

    def start(self) -> None:
        """Load our encoder now, if there is one, rather than when enough text has come."""
        self._asked = COLD_CHARS
        if not isinstance(self._compiled, str):
            self._compiled.encode(["a"], None)

    def _encoder_for(self, texts: Sequence[str]) -> Encoder | None:
        """Our encoder if there is one and these texts, and those before, are worth its start."""
        chars = sum(map(len, texts))
        self._asked += chars
        if self._asked < COLD_CHARS or chars < WARM_CHARS:
            return None
        if not isinstance(self._compiled, str):
            return self._compiled
        from microlm.text.compiled import tell_slow

        tell_slow("tokenizer", "through the library tokenizers")
        return None

    def encode(self, text: str, allow_control: bool = False) -> list[int]:
        """The ids of a text; lone surrogates cannot be encoded and are an error of the caller.

        Control tokens in the text stay text, unless `allow_control`: then each becomes its id.
        """
        if allow_control:
            return list(self._controlled.encode(text, add_special_tokens=False).ids)
        if len(text) >= WARM_CHARS:
            return self.encode_batch([text])[0]
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts."""
        if encoder := self._encoder_for(texts):
            ids, ends = self._encode(encoder, texts, None)
            row = ids.tolist()
            return [row[begin:end] for begin, end in pairwise([0, *ends.tolist()])]
        return [e.ids for e in self._through_library(texts)]

    def _through_library(self, texts: Sequence[str]) -> Sequence[Any]:
        """The encodings of `tokenizers`, on all cores if that is worth waking its threads."""
        if sum(map(len, texts)) < WARM_CHARS:
            return [self._plain.encode(text, add_special_tokens=False) for text in texts]
        return self._plain.encode_batch_fast(list(texts), add_special_tokens=False)

    def encode_arrays(self, texts: Sequence[str], closing: int | None = None) -> tuple[Ids, Ends]:
        """The ids of many texts in a row (uint16, uint32 if the vocabulary is larger), and the end of each.

        `closing` is an id that is put after every text, if there is one.
        """
        return self._encode(self._encoder_for(texts), texts, closing)

    def _encode(self, encoder: Encoder | None, texts: Sequence[str], closing: int | None) -> tuple[Ids, Ends]:
        """The same through our encoder, or through `tokenizers`; batch by batch, for the memory."""
        parts: list[Ids] = [np.zeros(0, self.dtype)]
        sizes: list[Ends] = [np.zeros(0, np.int64)]
        last = [] if closing is None else [closing]
        for some in _batches(texts):
            if encoder:
                ids, ends = encoder.encode(some, closing)
                parts.append(ids)
                sizes.append(np.diff(ends, prepend=0))
                continue
            found = self._through_library(some)
            parts += [np.array(encoding.ids + last, dtype=self.dtype) for encoding in found]
            sizes.append(np.array([len(encoding.ids) + len(last) for encoding in found], dtype=np.int64))
        return np.concatenate(parts), np.cumsum(np.concatenate(sizes))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens and an incomplete last character left out."""
        raw = b"".join(map(self.token_bytes.__getitem__, ids))
        return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)

    def stream(self) -> StreamDecoder:
        """An incremental decoder."""
        return StreamDecoder(self.token_bytes)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id; b"" for special tokens and for ids that no token has."""
        table: list[bytes] = [b""] * self.vocab_size
        hidden = {self.pad_id, self.eos_id, self.start_id} | {t.id for t in self._known.added}
        for token, number in self._known.ids.items():
            if number in hidden:
                continue
            try:
                table[number] = bytes(BYTE_OF[c] for c in token)
            except KeyError:
                raise UserError(
                    f"{self.path}: token {token!r} is not of byte-level BPE; only that is read"
                ) from None
        for added in self._known.added:
            if not added.special and added.content not in SPECIAL:
                table[added.id] = added.content.encode()
        return table


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, about a million characters at a time."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield some
            some, size = [], 0
    if some:
        yield some


def copy_files(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, and nothing else, of one directory into a model's HF directory."""
    if not (source / FILES[0]).is_file():
        raise UserError(f"{source}: no {FILES[0]} there; expected a tokenizer or a Hugging Face model")
    with storage.explain_write(target):
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


class StreamDecoder:
    """Ids in, text out as soon as whole characters are there: never half a character."""

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes."""
        return self._decoder.decode(self._table[token_id])

    def finish(self) -> str:
        """Forget an incomplete last character."""
        self._decoder.reset()
        return ""
