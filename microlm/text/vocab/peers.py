"""Tokenizers of anyone's making, side by side. Enters: a word that names one. Leaves: a `Peer`.

A word is a directory, `builtin:NAME`, a tokenizer.json, .tiktoken, SentencePiece .model or BERT vocab.txt,
`package:NAME` of an installed Python package that carries such a file, or `owner/name` on the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.text.vocab import ranks

NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_WAIT_S = 10.0


class Cut(NamedTuple):
    """How a text is cut: an id, the characters it covers (several may share one), whether it is unknown."""

    ids: list[int]
    spans: list[tuple[int, int]]
    unknown: list[bool]


class Peer(Protocol):
    """A tokenizer that is compared."""

    name: str
    algorithm: str
    vocab_size: int

    def cut(self, texts: Sequence[str]) -> list[Cut]:
        """The texts cut, control tokens in them taken as text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


class _Rust:
    """A tokenizer that `tokenizers` runs."""

    def __init__(self, name: str, inner: HFTokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        added = inner.get_added_tokens_decoder().values()
        inner.add_special_tokens([AddedToken(token.content, special=True) for token in added])
        inner.encode_special_tokens = True
        model = json.loads(inner.to_str())["model"]
        unknown = model.get("unk_token")
        self._unknown = inner.token_to_id(unknown) if unknown else model.get("unk_id")
        self._inner = inner
        self.name, self.vocab_size = name, inner.get_vocab_size()
        self.algorithm = str(model.get("type") or "BPE")

    def cut(self, texts: Sequence[str]) -> list[Cut]:
        """See `Peer`."""
        found = self._inner.encode_batch(list(texts), add_special_tokens=False)
        return [Cut(e.ids, e.offsets, [i == self._unknown for i in e.ids]) for e in found]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Peer`."""
        return str(self._inner.decode(list(ids), skip_special_tokens=False))


class _SentencePiece:
    """A SentencePiece model, run by its own library."""

    algorithm = "SentencePiece"

    def __init__(self, name: str, processor: Any) -> None:
        self._inner = processor
        self.name, self.vocab_size = name, int(processor.get_piece_size())

    def cut(self, texts: Sequence[str]) -> list[Cut]:
        """See `Peer`."""
        return [self._cut(text) for text in texts]

    def _cut(self, text: str) -> Cut:
        found = self._inner.encode(text, return_type="offset_mapping")
        spans: list[tuple[int, int]] = found["offsets"]
        for i in range(len(spans) - 2, -1, -1):
            if spans[i][0] == spans[i][1]:  # only the last byte of a character is said to cover it
                spans[i] = spans[i + 1]
        unknown = self._inner.unk_id()
        return Cut(found["ids"], spans, [number == unknown for number in found["ids"]])

    def decode(self, ids: Sequence[int]) -> str:
        """See `Peer`."""
        return str(self._inner.decode(list(ids)))


def open_peer(word: str) -> Peer:
    """The tokenizer that a word names, NAME=WORD giving it another name; UserError when there is none."""
    name, sign, place = word.partition("=")
    if not sign:
        name, place = "", word
    if place.startswith("package:"):
        return _open(_in_package(place.removeprefix("package:")), name or place)
    path = storage.local_path(place)
    if path.exists():
        return _open(path, name or place.rstrip("/"))
    if _HUB.fullmatch(place) and not place.startswith("."):
        return _open(_from_hub(place), name or place)
    raise UserError(
        f"{place}: no tokenizer there; give a directory, a tokenizer.json, .tiktoken, .model or vocab.txt "
        "file, package:NAME, or owner/name of the Hugging Face hub"
    )


def _open(path: Path, name: str) -> Peer:
    file = _file_in(path) if path.is_dir() else path
    if file.suffix == ".model":
        return _SentencePiece(name, _processor(file))
    readers: dict[str, Callable[[Path], HFTokenizer]] = {
        ".json": _tokenizer_json, ".tiktoken": ranks.read, ".txt": _word_piece,
    }  # fmt: skip
    if file.suffix not in readers:
        raise UserError(f"{file}: not a tokenizer; expected .json, .tiktoken, .model or vocab.txt")
    return _Rust(name, readers[file.suffix](file))


def _file_in(folder: Path) -> Path:
    found = [folder / name for name in NAMES if (folder / name).is_file()] or sorted(
        folder.glob("*.tiktoken")
    )
    if not found:
        raise UserError(
            f"{folder}: holds no tokenizer; expected one of {', '.join(NAMES)} or a .tiktoken file"
        )
    return found[0]


def _tokenizer_json(file: Path) -> HFTokenizer:
    try:
        return HFTokenizer.from_file(str(file))
    except Exception as e:  # tokenizers raises bare Exception for every fault of the file
        raise UserError(f"{file}: not a tokenizer file ({str(e)[:120]}); download it again") from None


def _word_piece(file: Path) -> HFTokenizer:
    """BERT's cutting by its vocab.txt; lower case unless tokenizer_config.json beside it says otherwise."""
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    config = file.with_name("tokenizer_config.json")
    try:
        lower = bool(json.loads(config.read_bytes()).get("do_lower_case", True)) if config.is_file() else True
        tokens = file.read_bytes().decode("utf-8").splitlines()
    except (ValueError, AttributeError) as e:
        raise UserError(f"{file}: not a BERT vocabulary ({str(e)[:80]}); download it again") from None
    vocab = {token: number for number, token in enumerate(tokens)}
    if "[UNK]" not in vocab:
        raise UserError(f"{file}: has no [UNK], so it is no BERT vocabulary; give a tokenizer.json instead")
    made = BertWordPieceTokenizer(vocab=vocab, lowercase=lower)
    return HFTokenizer.from_str(made.to_str())


def _processor(file: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ModuleNotFoundError:
        raise UserError(
            f"{file}: needs the extra 'sentencepiece': pip install 'microlm[sentencepiece]'"
        ) from None
    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as e:
        raise UserError(f"{file}: not a SentencePiece model ({str(e)[:80]}); download it again") from None


def _in_package(word: str) -> Path:
    """The tokenizer file among those of an installed package, which is not imported."""
    name, _, wanted = word.partition("/")
    try:
        files = metadata.files(name) or []
    except (metadata.PackageNotFoundError, ValueError):
        raise UserError(f"package:{word}: '{name}' is not installed; pip install {name or 'NAME'}") from None
    kinds = [f for f in files if f.name in NAMES or f.suffix == ".tiktoken"]
    found = [f for f in kinds if Path(str(f.locate())).is_file()]
    chosen = [f for f in found if f.name == wanted or str(f) == wanted] if wanted else found
    if not found:
        raise UserError(f"package:{word}: '{name}' carries no tokenizer; name a file or a directory")
    if not chosen or len({f.name for f in chosen}) > 1:
        names = ", ".join(sorted({f"package:{name}/{f.name}" for f in found}))
        raise UserError(f"package:{word}: choose one of {names}")
    return Path(str(chosen[0].locate()))


def _from_hub(name: str) -> Path:
    """The tokenizer.json of a model on the Hugging Face hub: the newest, or one fetched before."""
    try:
        import httpx
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    except ModuleNotFoundError:
        raise UserError(f"{name}: needs the extra 'hub': pip install 'microlm[hub]'") from None
    file = NAMES[0]
    try:
        revision = HfApi().model_info(name, timeout=_WAIT_S).sha  # fails at once where there is no network
        return Path(hf_hub_download(name, file, revision=revision))
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError, ValueError) as e:
        problem = (str(e).splitlines() or [type(e).__name__])[0][:120]
    try:
        return Path(hf_hub_download(name, file, local_files_only=True))
    except (OSError, ValueError):
        raise UserError(
            f"{name}: no such directory here, and no {file} from the hub ({problem}); check the name, or the "
            "connection"
        ) from None
