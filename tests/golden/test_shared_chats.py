"""The real conversations: what is learnt of every one, and one prompt in training, engine, transformers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from chat_models import as_dicts, tools_of
from shared_data import raw_lines
from transformers import AutoTokenizer

from microlm.core.manifest import open_artifact
from microlm.core.records import Conversation
from microlm.engine.prompts import encode_prompt
from microlm.text.chat import encode_chats, template_of
from microlm.text.chat.chatml import ChatML
from microlm.text.read import texts_of
from microlm.text.sources.shapes import parse_line
from microlm.text.tokenizer import Tokenizer

FILES = {"sft_single.jsonl.zst": 27539, "sft_chat.jsonl.zst": 2545, "sft_toolcall.jsonl.zst": 265}
CHUNK = 512
pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def folder() -> Path:
    return open_artifact("builtin:zh-6400").path


def read(name: str) -> list[Conversation]:
    found = [parse_line(line, f"{name}:{n}") for n, line in enumerate(raw_lines(name), 1)]
    assert len(found) == FILES[name]
    return [record for record in found if isinstance(record, Conversation)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_of_every_conversation_answers_and_their_eos_are_learnt(folder: Path, name: str) -> None:
    """No token of a user, system turn or tool is a label; every answer's EOS is; over the whole file."""
    tokenizer = Tokenizer.load(folder)
    template = template_of(tokenizer)
    assert isinstance(template, ChatML)
    chats = read(name)
    assert len(chats) > 0.99 * FILES[name]
    answers = eos_learnt = given_learnt = 0
    for start in range(0, len(chats), CHUNK):
        some = chats[start : start + CHUNK]
        for chat, encoded in zip(some, encode_chats(tokenizer, some), strict=True):
            ids, learnt = np.array(encoded[0]), np.array(encoded[1], bool)
            said = np.array([turn.role == "assistant" for turn in template.turns(chat)])
            begins, ends = ids == tokenizer.start_id, ids == tokenizer.eos_id
            assert begins.sum() == ends.sum() == len(said), chat.source
            by_assistant = said[np.cumsum(begins) - 1]
            given_learnt += int((learnt & ~by_assistant).sum())
            answers += int(said.sum())
            eos_learnt += int((learnt & ends).sum())
    assert given_learnt == 0 and eos_learnt == answers >= len(chats)


def prefixes(chats: Iterator[Conversation]) -> Iterator[tuple[Conversation, Conversation]]:
    """A conversation, and what of it asks for its first and for its last answer."""
    for chat in chats:
        asked = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
        for i in {asked[0], asked[-1]}:
            yield chat, Conversation(chat.messages[:i], tools=chat.tools)


def test_prompts_of_training_engine_and_transformers_are_the_same(folder: Path) -> None:
    """A thousand conversations: 265 with tools, the rest chats and single questions."""
    tokenizer, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    counts, checked = (
        {"sft_toolcall.jsonl.zst": 400, "sft_chat.jsonl.zst": 500, "sft_single.jsonl.zst": 300},
        0,
    )
    for name, count in counts.items():
        plain = (chat for chat in read(name)[:: 5 if "tool" not in name else 1] if benign(tokenizer, chat))
        some = list(islice(plain, count))
        checked += len(some)
        trained = {id(chat): ids for chat, (ids, _) in zip(some, encode_chats(tokenizer, some), strict=True)}
        for chat, asked in prefixes(iter(some)):
            served = encode_prompt(tokenizer, asked, tokenizer.vocab_size)
            hf = theirs.apply_chat_template(
                as_dicts(asked), tools=tools_of(asked), add_generation_prompt=True, return_dict=False
            )
            assert served == hf, chat.source
            assert trained[id(chat)][: len(served)] == served, chat.source
    assert checked >= 1000


def benign(tokenizer: Tokenizer, chat: Conversation) -> bool:
    """Whether nobody typed a control token: transformers takes that for one."""
    return not any(token in text for text in texts_of(chat) for token in tokenizer.control)
