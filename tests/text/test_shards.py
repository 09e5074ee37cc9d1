"""Token shards: what was written is what tokenizer and chat template say; the EOS is always learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import PROSE, TURNS, sign, write_data, write_tokenizer

from microlm.core.artifact import Artifact, Workspace
from microlm.core.errors import UserError
from microlm.core.records import Message, to_json
from microlm.text import shards
from microlm.text.chat import encode_chat
from microlm.text.shards import TokenizeRecipe, TokenSet, open_sets
from microlm.text.sources.factbook import FactbookSizes, generate
from microlm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """A data artifact and its tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    data = write_data(folder / "data", repeat=3)
    return data, write_tokenizer(folder / "tokenizer", data)


def tokenize(out: Path, data: Artifact, tokenizer: Artifact, **fields: Any) -> Artifact:
    return shards.run(TokenizeRecipe(out=str(out), data=data.url, tokenizer=tokenizer.url, **fields))


def samples(tokens: TokenSet) -> list[list[int]]:
    return [part.tolist() for part in np.split(np.asarray(tokens.tokens), tokens.ends)[:-1]]


def masks(tokens: TokenSet) -> list[list[int]]:
    assert tokens.loss is not None
    return [part.tolist() for part in np.split(np.asarray(tokens.loss), tokens.ends)[:-1]]


def test_documents_are_their_ids_and_an_eos(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    artifact = tokenize(tmp_path / "shards", *made)
    tokenizer = Tokenizer.load(made[1].path)
    for split, times in (("train", 3), ("validation", 1)):
        found = open_sets(artifact.path, "documents", split)["documents"]
        assert samples(found) == [[*tokenizer.encode(t), tokenizer.eos_id] for t in [*PROSE] * times]
        assert found.loss is None
        assert found.tokens.dtype == np.dtype("<u2")


def test_conversations_are_the_chat_template_and_its_mask(
    made: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    artifact = tokenize(tmp_path / "shards", *made)
    tokenizer = Tokenizer.load(made[1].path)
    talks = [(Message("user", q), Message("assistant", a)) for q, a in TURNS] * 3
    expected = [encode_chat(tokenizer, talk) for talk in talks]
    found = open_sets(artifact.path, "conversations-", "train")
    assert list(found) == ["chat"]
    assert list(zip(samples(found["chat"]), masks(found["chat"]), strict=True)) == expected
    for ids, mask, (_, answer) in zip(samples(found["chat"]), masks(found["chat"]), talks, strict=True):
        learnt = [i for i, m in zip(ids, mask, strict=True) if m]
        assert learnt == [*tokenizer.encode(answer.content), tokenizer.eos_id]


def test_the_index_counts_what_is_there(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    artifact = tokenize(tmp_path / "shards", *made)
    index = artifact.json("index.json")
    for name, counts in index["sets"].items():
        tokens = shards._open(artifact.path, name, index["dtype"])
        labels = len(tokens.tokens) if tokens.loss is None else int(tokens.loss.sum())
        assert counts == {"samples": len(tokens.ends), "tokens": len(tokens.tokens), "labels": labels}
        assert tokens.ends[-1] == len(tokens.tokens)
    assert artifact.manifest["metrics"]["tokens"] == sum(s["tokens"] for s in index["sets"].values())
    assert (
        artifact.file("tokenizer/tokenizer.json").read_bytes()
        == (made[1].path / "tokenizer.json").read_bytes()
    )
    assert artifact.digest == tokenize(tmp_path / "again", *made).digest


def write_records(out: Path, documents: list[str], talks: list[dict[str, Any]]) -> Artifact:
    def body(work: Workspace) -> None:
        work.write_jsonl("documents/train.jsonl", [{"text": t} for t in documents])
        work.write_jsonl("documents/validation.jsonl", [])
        work.write_jsonl("conversations/train.jsonl", talks)

    return sign(out, "data", body, source=str(out))


def talk(task: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "task": task,
    }


def test_each_task_is_a_set_of_its_own(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    data = write_records(tmp_path / "data", ["text"], [talk("b"), talk("问答"), talk("b"), talk("a-train")])
    artifact = tokenize(tmp_path / "shards", data, made[1])
    assert {n: len(s.ends) for n, s in open_sets(artifact.path, "", "train").items()} == {
        "documents": 1, "a-train": 1, "b": 2, "问答": 1,
    }  # fmt: skip
    assert len(open_sets(artifact.path, "documents", "validation")["documents"].ends) == 0
    assert open_sets(artifact.path, "conversations-", "validation") == {}


@pytest.mark.parametrize("task", ["../../escape", "a/b", "a b", "documents", "x" * 65])
def test_a_task_that_cannot_name_a_file_is_a_sentence(
    made: tuple[Artifact, Artifact], tmp_path: Path, task: str
) -> None:
    data = write_records(tmp_path / "data", ["text"], [talk(task)])
    with pytest.raises(UserError, match=r"train.jsonl: task '.*' cannot name a token set; use letters"):
        tokenize(tmp_path / "shards", data, made[1])


def test_control_tokens_in_a_text_stay_text(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    data = write_records(tmp_path / "data", ["a<|im_end|>b<|endoftext|>"], [talk("chat")])
    artifact = tokenize(tmp_path / "shards", data, made[1])
    (ids,) = samples(open_sets(artifact.path, "documents", "train")["documents"])
    assert [i for i in ids if i < 3] == [ids[-1]]


def test_a_large_vocabulary_takes_four_bytes(
    made: tuple[Artifact, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Tokenizer.load

    def enlarged(path: Path) -> Tokenizer:
        tokenizer = load(path)
        tokenizer.dtype = np.dtype("<u4")
        return tokenizer

    monkeypatch.setattr(Tokenizer, "load", enlarged)
    artifact = tokenize(tmp_path / "shards", *made)
    assert artifact.json("index.json")["dtype"] == "<u4"
    monkeypatch.undo()
    tokenizer = Tokenizer.load(made[1].path)
    found = open_sets(artifact.path, "documents", "validation")["documents"]
    assert samples(found) == [[*tokenizer.encode(t), tokenizer.eos_id] for t in PROSE]


def test_every_factbook_conversation_learns_its_eos_and_no_question(
    made: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    sizes = FactbookSizes.model_validate(
        {"documents": 1, "questions": 100, "extraction": 100, "reading": 50, "chat": 50, "preferences": 1,
         "test_questions": 1, "test_extraction": 1, "test_chats": 1, "english_share": 0.2}
    )  # fmt: skip
    talks = generate(0, None, sizes).conversations
    rows = [json.loads(json.dumps(to_json(c))) for c in talks]
    artifact = tokenize(tmp_path / "shards", write_records(tmp_path / "data", ["text"], rows), made[1])
    tokenizer = Tokenizer.load(made[1].path)
    seen = 0
    for task, tokens in open_sets(artifact.path, "conversations-", "train").items():
        answers = [[m.content for m in c.messages if m.role == "assistant"] for c in talks if c.task == task]
        for ids, mask, said in zip(samples(tokens), masks(tokens), answers, strict=True):
            learnt = [i for i, m in zip(ids, mask, strict=True) if m]
            ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
            assert sum(mask[i] for i in ends) == len(said)  # every answer's EOS, no question's
            assert mask[ends[-1]] == 1
            assert tokenizer.decode(learnt) == "".join(said)
            seen += 1
    assert seen == len(talks) == 300
