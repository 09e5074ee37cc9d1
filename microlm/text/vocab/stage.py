"""Stage `tokenizer`: a data artifact → byte-level BPE in HF form, with its chat template and its fertility.

The three control tokens are ids 0, 1, 2 and never in the training text; all 256 bytes are in the alphabet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from pydantic import Field
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from microlm.core.artifact import Artifact, Workspace, stage
from microlm.core.errors import UserError
from microlm.core.metrics import Progress
from microlm.core.recipe import StageRecipe, artifact_input
from microlm.core.records import Conversation, Document, Extraction
from microlm.text import chat, extraction
from microlm.text.read import read_records
from microlm.text.tokenizer import END, PAD, SPECIAL, START, Tokenizer

SMALLEST = len(SPECIAL) + 256
_BATCH = 256  # texts handed to the trainer at once
_HAN = re.compile("[\u4e00-\u9fff]")
_LATIN = re.compile("[A-Za-z]")


class TokenizerRecipe(StageRecipe):
    """How the tokenizer is trained."""

    data: str = artifact_input(kinds=("data",), description="data artifact; its training splits are read")
    vocab_size: int = Field(
        6400, le=1_000_000, description="entries, the 3 control tokens and 256 bytes included"
    )
    han_alone: bool = Field(
        False, description="each Han character and digit is its own piece (copies unseen names; more tokens)"
    )
    min_frequency: int = Field(2, ge=1, description="occurrences that a merge must have")
    max_documents: int | None = Field(None, ge=1, description="documents, and conversations, read at most")
    fertility_documents: int = Field(500, ge=1, description="held-out texts measured per domain at most")


@stage("tokenizer", kind="tokenizer", version=1)
def run(recipe: TokenizerRecipe, work: Workspace) -> None:
    """Train on documents and conversations, write the HF files, measure tokens per byte on held-out text."""
    if recipe.vocab_size < SMALLEST:
        raise UserError(
            f"tokenizer: vocab_size {recipe.vocab_size} is too small for {len(SPECIAL)} control tokens "
            f"and 256 bytes; set vocab_size to {SMALLEST} or more"
        )
    data = work.inputs["data"]
    inner, texts = train(recipe, training_texts(data, recipe.max_documents))
    if not texts:
        raise UserError(
            f"{data.url}: no training text in documents/ or conversations/; check the data stage's audit"
        )
    write_files(inner, work)
    rows = fertility(Tokenizer.load(work.path), data, recipe.fertility_documents)
    work.write_json("logs/fertility.json", rows)
    work.metrics |= {
        "vocab_size": inner.get_vocab_size(),
        "vocab_size_asked": recipe.vocab_size,
        "texts": texts,
        "bytes_per_token": {row["domain"]: row["bytes_per_token"] for row in rows},
    }


def training_texts(data: Artifact, limit: int | None) -> Iterator[str]:
    """Documents, then every message with its role, as the template writes it but for the control tokens."""
    for document in islice(_records(data, "documents/train.jsonl", Document), limit):
        yield document.text
    for conversation in islice(_records(data, "conversations/train.jsonl", Conversation), limit):
        for message in conversation.messages:
            yield f"{message.role}\n{message.content}"


def train(recipe: TokenizerRecipe, texts: Iterator[str]) -> tuple[HFTokenizer, int]:
    """A trained tokenizer (smaller than asked when there are no more merges), and how many texts it saw."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = _pre_tokenizer(recipe.han_alone)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        min_frequency=recipe.min_frequency,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with Progress("tokenizer", None, "texts") as bar:

        def batches() -> Iterator[list[str]]:
            while batch := list(islice(texts, _BATCH)):
                bar.update(len(batch))
                yield batch

        inner.train_from_iterator(batches(), trainer)
        bar.update(0, vocabulary=_size_in_words(inner.get_vocab_size(), recipe.vocab_size))
        return inner, int(bar.done)


def _size_in_words(size: int, asked: int) -> str:
    return f"{size}" if size == asked else f"{size} of {asked} (the corpus has no more merges)"


def _pre_tokenizer(han_alone: bool) -> pre_tokenizers.PreTokenizer:
    """Where no token may reach across: words, digits, and (when asked) each Han character."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if han_alone:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex("[\u4e00-\u9fff]|\\d"), "isolated"), words]
        )
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


def write_files(inner: HFTokenizer, work: Workspace) -> None:
    """The files that `AutoTokenizer` of plain transformers reads."""
    inner.save(str(work.path / "tokenizer.json"))
    names = {"eos_token": END, "pad_token": PAD}
    control = {str(i): _control(token) for i, token in enumerate(SPECIAL)}
    work.write_json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": control,
            "additional_special_tokens": [START],
            "bos_token": None,
            **names,
            "unk_token": None,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": chat.template_text(None),
        },
    )
    work.write_json("special_tokens_map.json", {"additional_special_tokens": [START], **names})
    work.write_text("chat_template.jinja", chat.template_text(None))


def _control(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": True}


def fertility(tokenizer: Tokenizer, data: Artifact, limit: int) -> list[dict[str, Any]]:
    """Bytes per token and tokens per character of held-out text, by domain; null where there is none."""
    domains: dict[str, Iterator[str]] = {
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
