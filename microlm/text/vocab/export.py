"""A tokenizer in the forms that other programs read: tiktoken, GGUF, a plain Hugging Face directory.

Each is loaded by the program it is for and compared on lines of text before it takes its place.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models

from microlm.core import runtime, storage
from microlm.core.errors import CheckFailed, UserError
from microlm.text.bpe import vocabulary
from microlm.text.bpe.pieces import Pieces
from microlm.text.bpe.vocabulary import BYTE_OF, Vocabulary
from microlm.text.chat.directory import read_sources, special_tokens
from microlm.text.tokenizer import PAD, Tokenizer, copy_files
from microlm.text.vocab import domains, gguf_file, ranks

_ODD = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
_RANDOM_LINES = 500
_SHOWN = 60  # characters of a text in a message
_RANGES = ((0x20, 0x7F), (0x4E00, 0xA000), (0xA0, 0x530), (0x3000, 0x3100), (0x1F300, 0x1F650), (9, 14))
Ids = list[list[int]]


class Written(NamedTuple):
    """A finished export: its place, and the lines on which `program` gave the same ids (0: not compared)."""

    path: str
    program: str
    lines: int


class _Source(NamedTuple):
    """A directory that is exported."""

    folder: Path
    tokenizer: Tokenizer
    known: Vocabulary


def sample_lines() -> list[str]:
    """Lines to compare on when nobody gives any: the samples by domain, and random characters."""
    rng = runtime.rng(0, "tokenizer export")
    lines = [line for texts in domains.samples().values() for t in texts for line in t.split("\n") if line]
    for _ in range(_RANDOM_LINES):
        kinds = [rng.choice(_RANGES) for _ in range(4)]
        lines.append("".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(1, 60))))
    return lines


def to_tiktoken(folder: Path, file: Path, lines: Sequence[str], *, check: bool = True) -> Written:
    """Write FILE with the ranks and FILE.json, which `tiktoken.Encoding` takes together."""
    source = _open(folder)
    known, pieces = source.known, _policy(source, "tiktoken")
    special = {token.content: token.id for token in known.added}
    tokens = {t: number for t, number in known.ids.items() if t not in special}
    ids = {bytes(BYTE_OF[c] for c in token): number for token, number in tokens.items()}
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / file.name
        ranks.write(made, ids, ranks.one_regex(pieces), special, folder.resolve().name)
        if check:
            texts = _as_they_see(source, lines)
            _require_equal(source, texts, _tiktoken(made, texts), "tiktoken")
        for path in (made, ranks.beside(made)):
            _place(file.with_name(path.name), path.read_bytes())
    return Written(str(file), "tiktoken", len(lines) if check else 0)


def to_gguf(folder: Path, file: Path, lines: Sequence[str], *, check: bool = True) -> Written:
    """Write the vocabulary, without weights, as a GGUF file."""
    source = _open(folder)
    vocab = _gguf_vocab(source)
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / "vocabulary.gguf"
        gguf_file.write(made, vocab, tensors=False)
        if check:
            texts = _as_they_see(source, lines)
            _require_equal(source, texts, gguf_file.llama_ids(vocab, texts), "llama.cpp")
        _place(file, made.read_bytes())
    return Written(str(file), "llama.cpp", len(lines) if check else 0)


def to_hf(folder: Path, target: Path, lines: Sequence[str], *, check: bool = True) -> Written:
    """Copy the tokenizer's files, and nothing else, into a directory that plain transformers opens."""
    source = _open(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is in the way; move it away or choose another folder")
    with storage.explain_write(target):
        target.resolve().parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.resolve().parent, prefix=f"{target.resolve().name}."))
    try:
        made.chmod(0o755)
        copy_files(folder, made)
        if check:
            _require_equal(source, lines, _transformers(made, lines), "transformers")
        with storage.explain_write(target):
            made.replace(target.resolve())
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Written(str(target), "transformers", len(lines) if check else 0)


def _open(folder: Path) -> _Source:
    return _Source(folder, Tokenizer.load(folder), vocabulary.read(folder / "tokenizer.json"))


def _require_equal(source: _Source, lines: Sequence[str], theirs: Ids, program: str) -> None:
    """Compare with our ids, control tokens recognised; the first text that differs is named."""
    for number, (line, ids) in enumerate(zip(lines, theirs, strict=True), 1):
        ours = source.tokenizer.encode(line, allow_control=True)
        if ours != ids:
            at = next((i for i, (a, b) in enumerate(zip(ours, ids, strict=False)) if a != b), len(ids))
            raise CheckFailed(
                f"{source.folder}: line {number} ({line[:_SHOWN]!r}): {program} differs from token {at}: "
                f"{ids[at : at + 5]} against {ours[at : at + 5]}; nothing was written"
            )


def _as_they_see(source: _Source, lines: Sequence[str]) -> Sequence[str]:
    """The lines as NFC where the tokenizer makes them so: tiktoken and llama.cpp leave that to who calls."""
    if not source.known.settings.get("normalizer"):
        return lines
    return [unicodedata.normalize("NFC", line) for line in lines]


def _tiktoken(file: Path, lines: Sequence[str]) -> Ids:
    try:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
    except ModuleNotFoundError:
        raise UserError(
            "tiktoken cannot check the file: pip install 'microlm[tiktoken]', or give --no-check"
        ) from None
    settings = json.loads(ranks.beside(file).read_bytes())
    encoding = tiktoken.Encoding(**settings, mergeable_ranks=load_tiktoken_bpe(str(file)))
    return [list(encoding.encode(line, allowed_special="all")) for line in lines]


def _transformers(folder: Path, lines: Sequence[str]) -> Ids:
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckFailed(f"{folder}: transformers does not open it ({str(e)[:120]})") from None
    return [list(theirs.encode(line, add_special_tokens=False)) for line in lines]


def _gguf_vocab(source: _Source) -> gguf_file.Vocab:
    pieces = _policy(source, "llama.cpp")
    whole = bool(source.known.settings["model"].get("ignore_merges"))
    pre = gguf_file.PRE.get((pieces, whole))
    if pre is None:
        known = dict.fromkeys(f"{p.pattern} with digits {p.digits}" for p, _ in gguf_file.PRE)
        raise UserError(
            f"{source.folder}: llama.cpp has no equal of {_words(pieces, whole)}; it has {', '.join(known)}, "
            "each with whitespace runs and Han characters not alone; train with one of these"
        )
    tokenizer, named = source.tokenizer, special_tokens(source.folder)
    pad = tokenizer.control.get(named.get("pad_token", PAD))
    eos = tokenizer.control.get(named.get("eos_token", ""), tokenizer.eos_id)
    return gguf_file.Vocab(source.known, pre, eos, pad, read_sources(source.folder).get("default"))


def _words(pieces: Pieces, whole: bool) -> str:
    alone = ", Han characters alone" if pieces.han_alone else ""
    taken = ", pieces that are tokens taken whole" if whole else ""
    return (
        f"pattern {pieces.pattern} with digits {pieces.digits}, whitespace {pieces.whitespace}{alone}{taken}"
    )


def _policy(source: _Source, program: str) -> Pieces:
    """How the tokenizer cuts; one that is not byte-level BPE, or cuts otherwise, is refused."""
    settings, place = source.known.settings, source.folder / "tokenizer.json"
    model = settings["model"]
    odd = [
        k
        for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(k)
    ]
    if model["type"] != "BPE" or odd:
        what = f"{model['type']} with {odd[0]}" if odd else f"{model['type']}, not byte-level BPE"
        raise UserError(f"{place}: is {what}, which {program} does not take; export a BPE tokenizer")
    if (settings.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise UserError(f"{place}: has a normalizer, which {program} has not; export one without")
    found = [p for p in all_pieces() if _steps(_described(p)) == _steps(settings.get("pre_tokenizer"))]
    if not found:
        raise UserError(
            f"{place}: its pre-tokenizer is none of gpt2, gpt4, qwen that {program} can be told; "
            "train one with 'microlm tokenizer train'"
        )
    return found[0]


def all_pieces() -> list[Pieces]:
    """Every policy that a tokenizer of ours can have."""
    return [
        Pieces(pattern, digits, whitespace, han_alone)
        for pattern in ("gpt2", "gpt4", "qwen")
        for digits in ("runs", "single", "triples")
        for whitespace in ("runs", "single")
        for han_alone in (False, True)
    ]


def _described(pieces: Pieces) -> Any:
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pieces.pre_tokenizer()
    return json.loads(inner.to_str())["pre_tokenizer"]


def _steps(described: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer but for what does not change the cut."""
    if not isinstance(described, dict):
        return []
    steps = described.get("pretokenizers", []) if described.get("type") == "Sequence" else [described]
    digits = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
    return [
        digits if s.get("type") == "Digits" and s.get("individual_digits") else
        {k: v for k, v in s.items() if k != "trim_offsets"}
        for s in steps
    ]  # fmt: skip


def _place(file: Path, data: bytes) -> None:
    with storage.explain_write(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(file, data)


FORMS: dict[str, Callable[..., Written]] = {"tiktoken": to_tiktoken, "gguf": to_gguf, "hf": to_hf}
