"""Byte-level BPE: strings ↔ ids through an HF `tokenizer.json`. Control tokens in user text stay text."""

from __future__ import annotations

import codecs
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

from microlm.core import storage
from microlm.core.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What a tokenizer is made of in an HF directory; a foreign directory may lack all but the first."""

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, START, END)
"""The ids 0, 1, 2 of every tokenizer that we train; `<|im_end|>` is the one EOS of documents and turns."""


class Tokenizer:
    """A loaded tokenizer. Ids are ints below `vocab_size`."""

    def __init__(self, inner: HFTokenizer, path: Path) -> None:
        self._inner = inner
        self._inner.encode_special_tokens = True  # `<|im_end|>` typed by a user is text
        self.path = path
        self.vocab_size: int = inner.get_vocab_size()
        self.pad_id, self.start_id, self.eos_id = (self._special(t) for t in SPECIAL)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer of an HF directory."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{path}: no tokenizer.json there; expected a Hugging Face directory")
        try:
            return cls(HFTokenizer.from_file(str(file)), path)
        except UserError:
            raise
        except Exception as e:  # tokenizers raises bare Exception for every fault of the file
            raise UserError(f"{file}: not a tokenizer file ({str(e)[:120]}); make it again") from None

    def _special(self, token: str) -> int:
        number = self._inner.token_to_id(token)
        if number is None:
            raise UserError(
                f"{self.path}: the tokenizer has no {token}; MicroLM needs ChatML's control tokens"
            )
        return int(number)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; lone surrogates cannot be encoded and are an error of the caller."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, on all cores."""
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens and an incomplete last character left out."""
        stream = self.stream()
        return "".join(stream.push(i) for i in ids) + stream.finish()

    def stream(self) -> StreamDecoder:
        """An incremental decoder."""
        return StreamDecoder(self.token_bytes)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id; b"" for special tokens."""
        table: list[bytes] = [b""] * self.vocab_size
        special = {self.pad_id, self.start_id, self.eos_id} | {
            i for i, t in self._inner.get_added_tokens_decoder().items() if t.special
        }
        for token, number in self._inner.get_vocab(with_added_tokens=True).items():
            if number in special:
                continue
            try:
                table[number] = bytes(_BYTE_OF[c] for c in token)
            except KeyError:
                raise UserError(
                    f"{self.path}: token {token!r} is not of byte-level BPE; only that is read"
                ) from None
        return table


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


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in character of every byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTE_OF = _byte_alphabet()
