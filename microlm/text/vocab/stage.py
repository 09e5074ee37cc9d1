"""Stage `tokenizer`: a corpus → a tokenizer in HF form, with its chat template, its report and its fertility.

The control tokens have the first ids, then come the 256 bytes. What a text says never counts as control.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, Literal

from pydantic import Field
from tokenizers import Tokenizer as HFTokenizer

from microlm.core.artifact import Artifact, Workspace, stage
from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.core.recipe import StageRecipe, artifact_input, unkeyed
from microlm.core.records import Conversation, Document, Extraction
from microlm.text import extraction, sources
from microlm.text.bpe import files
from microlm.text.bpe.pieces import Pattern, Pieces
from microlm.text.bpe.texts import DataTexts, SourceTexts
from microlm.text.bpe.train import Plan, train
from microlm.text.chat import template_text
from microlm.text.read import read_records
from microlm.text.sources import Tally
from microlm.text.tokenizer import MARKS, SPECIAL, Tokenizer, reserved
from microlm.text.vocab import others

_HAN = re.compile("[\u4e00-\u9fff]")
_LATIN = re.compile("[A-Za-z]")


class TokenizerRecipe(StageRecipe):
    """How the tokenizer is trained."""

    data: str | None = artifact_input(
        None, kinds=("data",), description="data artifact; its training splits are read"
    )
    source: str | list[str] | None = unkeyed(
        None,
        description="in place of data: jsonl:PATH, parquet:, csv:, text:, markdown:, hf:NAME, ms:, a list",
    )
    algorithm: Literal["bpe", "unigram", "wordpiece", "sentencepiece"] = Field(
        "bpe", description="byte-pair encoding, or another one to compare with"
    )
    mode: Literal["aligned", "exact"] = Field(
        "aligned", description="aligned: no token cuts through a character; exact: the merges of tokenizers"
    )
    vocab_size: int = Field(
        6400, le=1_000_000, description="entries, the control tokens and 256 bytes included"
    )
    pattern: Pattern = Field("gpt2", description="where words end: as GPT-2, GPT-4 or Qwen cuts them")
    digits: Literal["single", "triples", "runs"] = Field(
        "single", description="numbers are cut into digits, groups of up to three, or as the pattern does it"
    )
    whitespace: Literal["runs", "single"] = Field(
        "runs", description="white space is cut as the pattern does it, or each character stands alone"
    )
    han_alone: bool = Field(
        False, description="each Han character is its own piece (copies unseen names; more tokens)"
    )
    reserved: int = Field(7, ge=0, le=1000, description="control tokens without a meaning yet")
    assistant_name: str | None = Field(
        "MicroLM", description="who the default system turn says the assistant is; null: no such turn"
    )
    min_frequency: int = Field(2, ge=1, description="occurrences that a merge must have")
    max_documents: int | None = Field(None, ge=1, description="documents, and conversations, read at most")
    fertility_documents: int = Field(500, ge=1, description="held-out texts measured per domain at most")
    memory_mb: int = unkeyed(2048, ge=1, description="memory of all processes together, kept while training")

    def control(self) -> tuple[str, ...]:
        """The control tokens in the order of their ids."""
        return (*SPECIAL, *MARKS, *reserved(self.reserved))

    def room(self) -> int:
        """How many tokens there can be beside control tokens and bytes."""
        return self.vocab_size - len(self.control()) - 256

    def pieces(self) -> Pieces:
        """Where no token may reach across."""
        return Pieces(self.pattern, self.digits, self.whitespace, self.han_alone)

    def words(self) -> tuple[str, ...]:
        """The words of `source`."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source or ())


def fingerprint(recipe: TokenizerRecipe) -> dict[str, Any]:
    """The bytes of the sources, if there are any."""
    if (recipe.data is None) == (not recipe.words()):
        raise UserError("tokenizer: is trained on data or on source; set one of the two")
    parsed = [sources.parse(word) for word in recipe.words()]
    return {"sources": sorted(([s.kind, s.fingerprint()] for s in parsed), key=repr)} if parsed else {}


@stage("tokenizer", kind="tokenizer", version=2, fingerprint=fingerprint)
def run(recipe: TokenizerRecipe, work: Workspace) -> None:
    """Train, write the HF files, measure tokens per byte on held-out text."""
    if recipe.room() < 0:
        raise UserError(
            f"tokenizer: vocab_size {recipe.vocab_size} is too small for {len(recipe.control())} control "
            f"tokens and 256 bytes; set vocab_size to {recipe.vocab_size - recipe.room()} or more"
        )
    template, data = template_text(recipe.assistant_name), work.inputs.get("data")
    texts = texts_of(recipe, data)
    train_it = train_bpe if recipe.algorithm == "bpe" else train_other
    inner, report = train_it(recipe, texts, work)
    tally = Tally.from_json(report["records"])
    require_texts(recipe, data, tally)
    for licence in tally.licences:
        work.licences.add(licence)
    files.write(inner, recipe.control(), template, work)
    rows = fertility(Tokenizer.load(work.path), data, recipe.fertility_documents)
    size = inner.get_vocab_size()
    if size < recipe.vocab_size:
        sys.stderr.write(f"tokenizer: {size} of {recipe.vocab_size} (the corpus has no more merges)\n")
    work.write_json("logs/fertility.json", rows)
    work.write_json("logs/training.json", report)
    work.metrics |= {
        "vocab_size": size,
        "vocab_size_asked": recipe.vocab_size,
        "texts": report["texts"],
        "bytes_per_token": {row["domain"]: row["bytes_per_token"] for row in rows},
    }


def texts_of(recipe: TokenizerRecipe, data: Artifact | None) -> DataTexts | SourceTexts:
    """What is trained on."""
    if data is not None:
        return DataTexts(data.path, recipe.max_documents)
    texts = SourceTexts(recipe.words(), recipe.max_documents)
    for source in texts.parsed():
        sys.stderr.write(f"tokenizer {source.word}: {sources.detect(source)}\n")
    return texts


def train_bpe(
    recipe: TokenizerRecipe, texts: DataTexts | SourceTexts, work: Workspace
) -> tuple[HFTokenizer, dict[str, Any]]:
    """Byte-pair encoding of our own: the tokenizer, and how it went."""
    plan = Plan(
        room=recipe.room(),
        pieces=recipe.pieces(),
        mode=recipe.mode,
        min_frequency=recipe.min_frequency,
        processes=recipe.parallel.processes,
        memory_bytes=recipe.memory_mb << 20,
    )
    trained = train(texts, plan, Progress, work.resume)
    report = trained.report.to_json() | {"records": trained.tally.to_json()}
    return files.assemble(trained.choice, plan.pieces, recipe.control()), report


def train_other(
    recipe: TokenizerRecipe, texts: DataTexts | SourceTexts, work: Workspace
) -> tuple[HFTokenizer, dict[str, Any]]:
    """Another algorithm, for comparison: the tokenizer, and what it read."""
    assert recipe.algorithm != "bpe", "it is trained by train_bpe"
    tally = Tally()
    every = chain.from_iterable(some for block in texts for some in block.texts(tally))
    trained = others.train(recipe.algorithm, every, recipe.vocab_size, recipe.pieces(), recipe.control())
    for name, content in trained.files.items():
        (work.path / name).write_bytes(content)
    return trained.inner, {
        "algorithm": recipe.algorithm,
        "texts": trained.texts,
        "left_out": trained.left_out,
        "records": tally.to_json(),
    }


def require_texts(recipe: TokenizerRecipe, data: Artifact | None, tally: Tally) -> None:
    """A UserError when there was nothing to train on, or most of it could not be read."""
    if data is None:
        sources.require_usable(sources.Source(", ".join(recipe.words()), "", ""), tally)
    elif not tally.kept:
        raise UserError(
            f"{data.url}: no training text in documents/ or conversations/; check the data stage's audit"
        )


def fertility(tokenizer: Tokenizer, data: Artifact | None, limit: int) -> list[dict[str, Any]]:
    """Bytes per token and tokens per character of held-out text, by domain; null where there is none."""
    domains: dict[str, Iterator[str]] = dict.fromkeys(
        ("Chinese prose", "English", "conversation", "extraction JSON"), iter(())
    )
    if data is not None:
        domains = {
            "Chinese prose": _prose(data, _is_chinese),
            "English": _prose(data, lambda text: not _is_chinese(text)),
            "conversation": _conversations(data),
            "extraction JSON": _answers(data),
        }
    return [_fertility_row(tokenizer, name, list(islice(texts, limit))) for name, texts in domains.items()]


def _fertility_row(tokenizer: Tokenizer, domain: str, texts: list[str]) -> dict[str, Any]:
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    size, characters = sum(len(t.encode()) for t in texts), sum(map(len, texts))
    return {
        "domain": domain,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / tokens if tokens else None,
        "tokens_per_char": tokens / characters if characters else None,
    }


def _prose(data: Artifact, wanted: Callable[[str], bool]) -> Iterator[str]:
    return (d.text for d in _records(data, "documents/validation.jsonl", Document) if wanted(d.text))


def _conversations(data: Artifact) -> Iterator[str]:
    for conversation in _records(data, "conversations/validation.jsonl", Conversation):
        if conversation.task != "extraction":
            yield "\n".join(m.content for m in conversation.messages)


def _answers(data: Artifact) -> Iterator[str]:
    for record in _records(data, "extraction/test.jsonl", Extraction):
        yield extraction.answer(record.relation, record.allowed or [t.relation for t in record.relation])


def _is_chinese(text: str) -> bool:
    """A Han character says about as much as a short word, so a third of the letters is enough."""
    return len(_HAN.findall(text)) * 3 >= len(_LATIN.findall(text))


def _records(data: Artifact, name: str, kind: type[Any]) -> Iterator[Any]:
    """The records of one file; a corpus without this kind of data has no such file."""
    path = data.path / name
    return read_records(path, kind) if path.exists() else iter(())
