"""Preferences as token sets: chosen and rejected in turn, the last answer alone learnt, no prompt twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from artifacts import TURNS, sign, write_data, write_tokenizer

from microlm.core.artifact import Artifact, Workspace
from microlm.core.recipe import build
from microlm.core.records import Message, Preference, to_json
from microlm.text import shards
from microlm.text.chat import encode_chat
from microlm.text.chat.pairs import encode_pairs, last_answer, sides
from microlm.text.prepare import PrepareRecipe
from microlm.text.prepare import run as prepare
from microlm.text.read import read_records
from microlm.text.shards import TokenizeRecipe, open_sets
from microlm.text.tokenizer import Tokenizer

EARLIER = (Message("system", "短"), Message("user", "李白是谁？"), Message("assistant", "唐代的诗人。"))
PAIRS = (
    Preference((Message("user", TURNS[0][0]),), TURNS[0][1], "不知道。"),
    Preference(
        (*EARLIER, Message("user", "他写了什么？")), "《静夜思》。", "<think>\n想\n</think>\n\n没有。"
    ),
    Preference((Message("user", "1+1?"),), "2", "3", task="sums"),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("made")
    return write_tokenizer(folder / "tokenizer", write_data(folder / "data"))


def write_pairs(out: Path, pairs: tuple[Preference, ...]) -> Artifact:
    def body(work: Workspace) -> None:
        work.write_jsonl("preferences/train.jsonl", [to_json(pair) for pair in pairs])
        work.write_jsonl("documents/train.jsonl", [{"text": "李白"}])

    return sign(out, "data", body)


def test_both_sides_are_the_template_and_only_their_last_answer_is_learnt(tokenizer: Artifact) -> None:
    loaded = Tokenizer.load(tokenizer.path)
    for pair, encoded in zip(PAIRS, encode_pairs(loaded, PAIRS), strict=True):
        for chat, text, (ids, mask) in zip(sides(pair), (pair.chosen, pair.rejected), encoded, strict=True):
            assert ids == encode_chat(loaded, chat.messages)[0]
            learnt = [i for i, m in zip(ids, mask, strict=True) if m]
            assert loaded.decode(learnt) == text and learnt[-1] == loaded.eos_id
            asked = encode_chat(loaded, pair.prompt, generation_prompt=True)[0]
            assert ids[: mask.index(1)] == asked  # an engine's prompt, with the earlier answer in it


def test_the_last_answer_of_a_mask() -> None:
    assert last_answer([0, 1, 1, 0, 1, 1, 0]) == [0, 0, 0, 0, 1, 1, 0]
    assert last_answer([1, 1]) == [1, 1]
    assert last_answer([0, 0]) == [0, 0]


def test_a_set_holds_chosen_and_rejected_in_turn(tokenizer: Artifact, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data", PAIRS)
    made = shards.run(TokenizeRecipe(out=str(tmp_path / "out"), data=data.url, tokenizer=tokenizer.url))
    assert list(made.json("index.json")["sets"]) == [
        "documents-train", "preferences-chat-train", "preferences-sums-train",
    ]  # fmt: skip
    assert list(open_sets(made.path, "", "train")) == ["documents"]  # what sft mixes
    found = open_sets(made.path, "preferences-", "train")
    assert {name: len(tokens.ends) for name, tokens in found.items()} == {"chat": 4, "sums": 2}
    expected = encode_pairs(Tokenizer.load(tokenizer.path), PAIRS[:2])
    chat = found["chat"]
    assert chat.loss is not None
    ids, masks = (np.split(np.asarray(column), chat.ends)[:-1] for column in (chat.tokens, chat.loss))
    written = [(i.tolist(), m.tolist()) for i, m in zip(ids, masks, strict=True)]
    assert written == [side for pair in expected for side in pair]


def test_answers_that_are_the_same_to_the_tokenizer_are_dropped_and_counted(
    tokenizer: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = Preference(PAIRS[0].prompt, "好", "好", source="mine")
    data = write_pairs(tmp_path / "data", (*PAIRS, same))
    made = shards.run(TokenizeRecipe(out=str(tmp_path / "out"), data=data.url, tokenizer=tokenizer.url))
    assert len(open_sets(made.path, "preferences-", "train")["chat"].ends) == 4
    assert made.json("logs/sources.json")["preferences/train.jsonl"]["dropped"] == {"equal_answers": 1}
    assert "preferences/train.jsonl: 1 of 4 records dropped (equal_answers 1)" in capsys.readouterr().err


def test_a_prompt_is_in_one_split_and_pairs_without_preference_are_counted(tmp_path: Path) -> None:
    """Ten pairs on each of 60 prompts; one more whose answers differ by an invisible character alone."""
    rows = [
        {"prompt": f"第{i}个问题是什么？", "chosen": f"好{j}", "rejected": f"坏{j}", "task": "quiz"}
        for i in range(60)
        for j in range(10)
    ]
    rows.append({"prompt": "问", "chosen": "好", "rejected": "好\u200b", "task": "quiz"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "out": str(tmp_path / "data"),
        "source": f"jsonl:{path}",
        "fill": "none",
        "validation_share": 0.2,
    }
    data = prepare(build(PrepareRecipe, values, "data"))
    found = {
        split: list(read_records(data.file(f"preferences/{split}.jsonl"), Preference))
        for split in ("train", "validation")
    }
    prompts = {split: {pair.prompt for pair in pairs} for split, pairs in found.items()}
    assert not prompts["train"] & prompts["validation"]
    assert {split: len(pairs) for split, pairs in found.items()} == {
        split: 10 * len(some) for split, some in prompts.items()
    }
    assert sum(map(len, prompts.values())) == 60
    assert 3 <= len(prompts["validation"]) <= 25
    assert {pair.task for pairs in found.values() for pair in pairs} == {"quiz"}
    steps = data.json("logs/audit.json")["steps"]
    reasons = {r["reason"]: r["records"] for step in steps.values() for r in step["reasons"]}
    assert reasons == {"equal_answers": 1}
