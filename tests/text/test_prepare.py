"""The data stage: a record is written or dropped with a reason, splits do not leak, bytes repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from microlm.core.artifact import Artifact
from microlm.core.errors import UserError
from microlm.core.recipe import build
from microlm.core.records import Conversation, Document, Extraction, Preference, Question
from microlm.text.audit import summary
from microlm.text.dedup import record_digest
from microlm.text.prepare import PrepareRecipe, run
from microlm.text.read import read_records
from microlm.text.split import SPLITS, TYPES

SMALL = {
    "documents": 60,
    "questions": 40,
    "extraction": 30,
    "reading": 10,
    "chat": 10,
    "preferences": 10,
    "test_questions": 10,
    "test_extraction": 10,
    "test_chats": 10,
}


def prepare(out: Path, **fields: Any) -> Artifact:
    return run(build(PrepareRecipe, {"out": str(out), "factbook": SMALL, **fields}, "test"))


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return f"jsonl:{path}"


def texts(artifact: Artifact, kind: str, split: str) -> list[str]:
    return [
        json.loads(line)["text"]
        for line in artifact.file(f"{kind}/{split}.jsonl").read_text("utf-8").splitlines()
    ]


def documents(count: int) -> list[dict[str, str]]:
    return [
        {"text": f"第{i}号诗人写过第{i * 7919}首诗，人们至今还在读它。", "licence": "MIT"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The factbook, prepared small."""
    return prepare(tmp_path_factory.mktemp("world") / "data")


def test_every_file_of_the_factbook_is_there_and_readable(world: Artifact) -> None:
    for kind, splits in SPLITS.items():
        for split in splits:
            assert list(read_records(world.file(f"{kind}/{split}.jsonl"), TYPES[kind])), f"{kind}/{split}"
    for split in ("train", "test"):
        assert list(read_records(world.file(f"questions/{split}.jsonl"), Question))
    chats = list(read_records(world.file("chats/test.jsonl"), Conversation))
    assert chats and all(chat.messages[-1].role == "user" for chat in chats)
    assert world.json("schema.json")
    assert world.manifest["licences"] == ["Apache-2.0"]
    assert world.file("logs/audit.html").read_text("utf-8").startswith("<!doctype html>")


def test_what_was_read_is_written_or_dropped(world: Artifact) -> None:
    audit = summary(world)
    dropped = sum(step["dropped"] for step in audit["steps"].values())
    written = sum(sum(counts.values()) for counts in audit["written"].values())
    assert audit["steps"]["read"]["read"] == dropped + written
    for step in audit["steps"].values():
        assert step["read"] == step["kept"] + sum(r["records"] for r in step["reasons"])


def test_no_training_record_is_held_out(world: Artifact) -> None:
    for kind, splits in SPLITS.items():
        held, trained = set(), set()
        for split in splits:
            digests = {
                record_digest(r) for r in read_records(world.file(f"{kind}/{split}.jsonl"), TYPES[kind])
            }
            (trained if split == "train" else held).update(digests)
        assert not held & trained
    assert set(summary(world)["leakage"].values()) == {0}


def test_equal_recipes_give_equal_bytes(world: Artifact, tmp_path: Path) -> None:
    again = prepare(tmp_path / "again")
    assert (again.key, again.digest) == (world.key, world.digest)
    other = prepare(tmp_path / "other", seed=1)
    assert (other.key, other.digest) != (world.key, world.digest)


def test_a_users_documents_are_taken_and_the_rest_is_filled_from_the_factbook(tmp_path: Path) -> None:
    rows = documents(200)
    source = write(tmp_path / "my.jsonl", [*rows, *rows[:20], {"text": "短"}, {"body": "x"}])
    artifact = prepare(tmp_path / "data", source=source)
    audit = summary(artifact)
    split = {name: texts(artifact, "documents", name) for name in SPLITS["documents"]}
    assert sorted(text for held in split.values() for text in held) == sorted(r["text"] for r in rows)
    assert audit["from_factbook"] == ["conversations", "extraction", "preferences"]
    reasons = {r["reason"]: r["records"] for step in audit["steps"].values() for r in step["reasons"]}
    assert reasons["duplicate_documents"] == 20
    assert reasons["too_short"] == reasons["missing_field:text (found body)"] == 1
    assert "rename it" in audit["warnings"][0]
    assert artifact.manifest["licences"] == ["Apache-2.0", "MIT"]
    assert artifact.file("questions/test.jsonl").read_bytes()


def test_without_filling_the_lacking_kinds_are_empty_files(tmp_path: Path) -> None:
    artifact = prepare(tmp_path / "data", source=write(tmp_path / "my.jsonl", documents(9)), fill="none")
    assert artifact.file("conversations/train.jsonl").read_bytes() == b""
    assert artifact.file("questions/test.jsonl").read_bytes() == b""
    assert artifact.json("schema.json") == {}
    sizes = [len(texts(artifact, "documents", s)) for s in ("train", "validation", "test")]
    assert sum(sizes) == 9 and min(sizes) >= 1  # even nine documents leave one to validate on


def test_the_same_file_elsewhere_has_the_same_key_and_a_changed_one_has_not(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one = prepare(tmp_path / "1", source=write(tmp_path / "my.jsonl", documents(20)), fill="none")
    two = prepare(tmp_path / "2", source=write(tmp_path / "b" / "my.jsonl", documents(20)), fill="none")
    three = prepare(tmp_path / "3", source=write(tmp_path / "my.jsonl", documents(21)), fill="none")
    assert (one.key, one.digest) == (two.key, two.digest)
    assert one.key != three.key and one.digest != three.digest


def test_documents_keep_their_place_and_several_sources_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("这是一篇关于诗人的笔记，写在很久以前。", encoding="utf-8")
    words = [write(tmp_path / "my.jsonl", documents(5)), f"text:{tmp_path / 'notes'}"]
    artifact = prepare(tmp_path / "data", source=words, fill="none")
    kept = [
        r for s in SPLITS["documents"] for r in read_records(artifact.file(f"documents/{s}.jsonl"), Document)
    ]
    assert {r.source for r in kept} == {*(f"my.jsonl:{i}" for i in range(1, 6)), "a.md"}


def talk(question: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"{question}答"}]
    }


def fact(i: int) -> dict[str, Any]:
    triple = {"head": f"甲{i}", "head_type": "人物", "relation": "籍贯" if i % 2 else "职业", "tail": "乙"}
    return {"cate": "人物", "text": f"甲{i}的事情是乙，这是第{i}句话。", "relation": [triple]}


def test_a_users_own_kinds_are_split_and_completed(tmp_path: Path) -> None:
    rows = [*(talk(f"问题{i}") for i in range(200)), *map(fact, range(100))]
    rows += [{"prompt": "问", "chosen": "好", "rejected": "坏"}]
    artifact = prepare(tmp_path / "data", source=write(tmp_path / "my.jsonl", rows), test_share=0.2)
    assert summary(artifact)["from_factbook"] == ["documents", "conversations"]
    for split in ("train", "test"):
        records = list(read_records(artifact.file(f"extraction/{split}.jsonl"), Extraction))
        assert 5 < len(records) < 95
        assert all(set(r.allowed) == {"籍贯", "职业"} for r in records)
    assert artifact.json("schema.json")["人物"]["籍贯"] == {"head_type": "人物", "tail_type": ""}
    held = list(read_records(artifact.file("conversations/validation.jsonl"), Conversation))
    chats = list(read_records(artifact.file("chats/test.jsonl"), Conversation))
    assert [c.messages for c in chats] == [h.messages[:1] for h in held]
    assert len(list(read_records(artifact.file("preferences/train.jsonl"), Preference))) == 1


def test_what_tidying_empties_is_dropped_and_counted(tmp_path: Path) -> None:
    blank = "\u200b\x07"
    rows = [*documents(5), talk("问题"), fact(1), {"prompt": "问", "chosen": "好", "rejected": "坏"}]
    rows += [
        {"messages": [{"role": "user", "content": blank}, {"role": "assistant", "content": "答"}]},
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": f" {blank}\n"}]},
        {**fact(2), "text": blank},
        {**fact(3), "relation": [{"head": blank, "relation": "籍贯", "tail": "乙"}]},
        {"prompt": "问", "chosen": blank, "rejected": "坏"},
    ]
    artifact = prepare(tmp_path / "data", source=write(tmp_path / "my.jsonl", rows), fill="none")
    audit = summary(artifact)
    clean = audit["steps"]["clean"]
    assert {r["reason"]: r["records"] for r in clean["reasons"]} == {"nothing_visible": 5}
    assert clean["read"] == len(rows) == clean["kept"] + clean["dropped"]
    written = sum(sum(counts.values()) for counts in audit["written"].values())
    assert audit["steps"]["read"]["read"] == written + 5


def test_training_text_that_is_held_out_is_taken_out(tmp_path: Path) -> None:
    facts = [fact(i) for i in range(100)]
    rows = [{"text": f["text"]} for f in facts] + facts + [talk(str(f["text"])) for f in facts]
    artifact = prepare(
        tmp_path / "data", source=write(tmp_path / "my.jsonl", rows), test_share=0.2, fill="none"
    )
    test = set(texts(artifact, "extraction", "test"))
    assert test and not test & set(texts(artifact, "documents", "train"))
    talks = read_records(artifact.file("conversations/train.jsonl"), Conversation)
    assert not test & {t.messages[0].content for t in talks}
    taken = {r["reason"]: r["records"] for r in summary(artifact)["steps"]["decontaminate"]["reasons"]}
    beside = set(texts(artifact, "documents", "validation")) | set(texts(artifact, "documents", "test"))
    assert taken["held_out_conversations"] == len(test | beside)
    assert not beside & set(texts(artifact, "extraction", "train"))


def test_documents_that_the_factbook_holds_out_are_taken_out(world: Artifact, tmp_path: Path) -> None:
    held = texts(world, "extraction", "test")
    rows = [*documents(20), *({"text": text} for text in held)]
    artifact = prepare(tmp_path / "data", source=write(tmp_path / "my.jsonl", rows), validation_share=0.01)
    assert texts(artifact, "extraction", "test") == held
    assert not set(held) & set(texts(artifact, "documents", "train"))
    (taken,) = summary(artifact)["steps"]["decontaminate"]["reasons"]
    assert taken["reason"] == "held_out_documents" and taken["records"] > len(held) // 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"source": []}, "is an empty list"),
        ({"source": "jsnol:x"}, "is not one of factbook"),
        ({"source": "factbook", "entities": "/none.jsonl"}, "no such file"),
        ({"validation_share": 0.6, "test_share": 0.4}, "nothing to train on"),
        ({"validation_shares": 0.6}, "did you mean 'validation_share'"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepare(tmp_path / "data", **fields)
    assert not (tmp_path / "data").exists()


def test_a_corpus_of_which_nothing_is_left_is_one_sentence(tmp_path: Path) -> None:
    source = write(tmp_path / "my.jsonl", [{"text": "短"}, {"text": "也短"}])
    with pytest.raises(UserError, match=r"nothing is left of 2 records after cleaning \(too_short 2\)"):
        prepare(tmp_path / "data", source=source, fill="none")


def test_strict_stops_at_the_first_fault(tmp_path: Path) -> None:
    source = write(tmp_path / "my.jsonl", [*documents(3), {"body": "x"}])
    with pytest.raises(UserError, match=r"my.jsonl:4: no key 'text'; found body"):
        prepare(tmp_path / "data", source=source, strict=True)
