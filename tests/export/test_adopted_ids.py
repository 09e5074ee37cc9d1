"""An adopted model is trained on the ids that it is served with: those of transformers, its end labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from artifacts import sign
from foreign import write_foreign
from transformers import AutoTokenizer

from microlm.core.artifact import Artifact
from microlm.core.records import Conversation, to_json
from microlm.engine.prompts import encode_prompt
from microlm.export import adopt
from microlm.model import directory
from microlm.text.chat.protection import template_message
from microlm.text.shards import TokenizeRecipe, open_sets
from microlm.text.shards import run as tokenize
from microlm.text.tokenizer import Tokenizer

CASES = {"smollm2": "llama", "qwen2.5": "qwen2", "qwen3": "qwen3", "llama-3.1": "llama"}
DAY = {"date_string": "26 Jul 2024"}


def talks() -> list[Conversation]:
    """Questions, extraction, small talk and readings of several turns, in both languages."""
    return adopt.conversations(adopt.AdoptRecipe(out="-", source="-", parity_chats=120))


def adopted(folder: Path, name: str) -> Artifact:
    write_foreign(folder / "source", CASES[name], name)
    return adopt.run(
        adopt.AdoptRecipe(out=str(folder / "model"), source=str(folder / "source"), parity_chats=8)
    )


def turns(chat: Conversation) -> list[dict[str, Any]]:
    return [template_message(m) for m in chat.messages]


@pytest.mark.parametrize("name", CASES)
def test_trained_served_and_transformers_ids_are_one(tmp_path: Path, name: str) -> None:
    model = adopted(tmp_path, name)
    # Qwen3 writes an answer otherwise once another turn follows it: it learns from single answers
    chats = [c for c in talks() if name != "qwen3" or len(c.messages) == 2]
    rows = [{**to_json(c), "task": "chat"} for c in chats]
    data = sign(
        tmp_path / "data", "data", lambda w: w.write_jsonl("conversations/train.jsonl", rows) and None
    )
    made = tokenize(TokenizeRecipe(out=str(tmp_path / "shards"), data=data.url, tokenizer=model.url))
    found = open_sets(made.path, "conversations-", "train")["chat"]
    tokenizer, theirs = Tokenizer.load(model.path), AutoTokenizer.from_pretrained(model.path)
    config = directory.read_config(model.path)
    ends = {config.eos_token_id, *config.more_eos_ids}
    starts = [0, *found.ends[:-1]]
    assert len(found.ends) == len(chats) >= 60 and found.loss is not None
    for chat, first, last in zip(chats, starts, found.ends, strict=True):
        ids, mask = found.tokens[first:last].tolist(), found.loss[first:last].tolist()
        assert ids == theirs.apply_chat_template(turns(chat), return_dict=False, **DAY)
        labelled = 0
        for number, message in enumerate(chat.messages):
            if message.role != "assistant":
                continue
            before = Conversation(chat.messages[:number])
            prompt = encode_prompt(tokenizer, before, config.vocab_size)
            asked = theirs.apply_chat_template(
                turns(before), add_generation_prompt=True, return_dict=False, **DAY
            )
            assert prompt == asked == ids[: len(prompt)] and not mask[len(prompt) - 1]
            size = mask[len(prompt) :].index(0) if 0 in mask[len(prompt) :] else len(ids) - len(prompt)
            answer = ids[len(prompt) : len(prompt) + size]
            assert answer[-1] in ends and answer[-1] == tokenizer.eos_id
            assert tokenizer.decode(answer).endswith(message.content)
            labelled += size
        assert sum(mask) == labelled
