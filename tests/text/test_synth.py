"""Synthesis from templates alone: asked = accepted + dropped, nothing twice, equal recipes, equal bytes."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import zstandard
from artifacts import write_data
from synth_runs import PEOPLE, lines, payload, recipe, seeds, synth

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Message
from microlm.text import sources
from microlm.text.read import read_records

ASK = {"name": "ask", "task": "question", "prompt": "{{ name }}生于哪一年？", "answer": "{{ born }}年。"}
TELL = {
    "name": "tell",
    "system": "简短。",
    "prompt": "介绍{{ name }}。",
    "answer": "{{ name }}生于{{ born }}年。",
}
ROWS: list[Any] = [
    {"name": "李白", "born": 701, "licence": "CC0-1.0"},
    {"name": "杜甫", "born": 712, "license": "MIT"},
    {"name": "杜甫 ", "born": 713},  # asks what the line before asks
    {"name": "王维"},  # was never born
]


@pytest.fixture
def seed_file(tmp_path: Path) -> str:
    path = seeds(tmp_path / "seeds.jsonl", ROWS)
    with Path(path).open("a") as f:
        f.write("{broken\n")
    return path


def test_everything_asked_is_accepted_or_dropped_with_a_reason(tmp_path: Path, seed_file: str) -> None:
    made = synth(tmp_path / "out", seeds=seed_file, templates=[ASK, TELL])
    counts = made.json("counts.json")
    assert counts["asked"] == 9 and counts["accepted"] == 4
    assert counts["dropped"] == {"duplicate_prompt": 2, "invalid_json": 1, "missing_field:born": 2}
    assert counts["templates"]["ask"] == {"asked": 4, "accepted": 2}
    assert counts["asked"] == counts["accepted"] + sum(counts["dropped"].values())
    assert set(made.json("logs/drops.json")) == set(counts["dropped"])
    assert made.kind == "data" and made.manifest["licences"] == ["CC0-1.0", "MIT"]


def test_a_conversation_and_its_request_name_each_other(tmp_path: Path, seed_file: str) -> None:
    made = synth(tmp_path / "out", seeds=seed_file, templates=[ASK, TELL])
    chats = list(read_records(made.file("conversations/train.jsonl"), Conversation))
    assert chats[0] == Conversation(
        (Message("user", "李白生于哪一年？"), Message("assistant", "701年。")),
        "question",
        "synth:seeds.jsonl:1/ask",
        "CC0-1.0",
    )
    assert chats[1].messages[0] == Message("system", "简短。")
    requests = lines(made.file("requests.jsonl"))
    assert len(requests) == 9
    kept = [r for r in requests if not r["reason"]]
    assert [r["record"] for r in kept] == list(range(len(chats)))
    assert [f"synth:{r['id']}" for r in kept] == [c.source for c in chats]
    for request, chat in zip(kept, chats, strict=True):
        assert [Message(**m) for m in request["messages"]] == list(chat.messages[:-1])


def test_equal_recipes_give_equal_bytes_and_the_seed_matters(tmp_path: Path) -> None:
    draws = {"prompt": "{{ ['问', '请问'] | random }}{{ number }}", "answer": "{{ [1, 2] | random }}号"}
    fields: dict[str, Any] = {"count": 40, "each": "one", "templates": [draws, draws | {"name": "other"}]}
    one, two = synth(tmp_path / "a", **fields), synth(tmp_path / "b", **fields)
    assert payload(one) == payload(two) and one.digest == two.digest
    assert synth(tmp_path / "c", seed=1, **fields).digest != one.digest
    asked = one.json("counts.json")["templates"]
    assert asked["template"]["asked"] + asked["other"]["asked"] == 40 and len(asked) == 2


def test_data_prepare_reads_what_is_written(tmp_path: Path, seed_file: str) -> None:
    made = synth(tmp_path / "out", seeds=seed_file, templates=[ASK, TELL])
    tally = sources.Tally()
    word = f"jsonl:{made.file('conversations/train.jsonl')}"
    read = list(sources.read(sources.parse(word), tally, strict=True))
    assert len(read) == 4 == tally.kept
    assert read == list(read_records(made.file("conversations/train.jsonl"), Conversation))


def test_seeds_come_from_an_artifact_with_its_licence(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", repeat=1)
    made = synth(
        tmp_path / "out",
        data=str(data.path),
        seeds="documents/train.jsonl",
        limit=3,
        templates=[{"prompt": "续写：{text}", "answer": "{text}"}],
        syntax="slots",
    )
    assert made.manifest["inputs"]["data"]["digest"] == data.digest
    assert made.manifest["licences"] == ["CC0-1.0"]
    assert made.json("counts.json")["asked"] == 3


def test_changed_seeds_are_another_artifact(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    first = synth(tmp_path / "out", seeds=seeds(path, ROWS), templates=[ASK])
    again = synth(tmp_path / "out", seeds=seeds(path, ROWS), templates=[ASK])
    assert again.manifest == first.manifest
    changed = synth(tmp_path / "out", seeds=seeds(path, ROWS[:1]), templates=[ASK])
    assert changed.key != first.key


def test_a_renamed_field_is_a_sentence(tmp_path: Path) -> None:
    path = seeds(tmp_path / "seeds.jsonl", [{"Name": n} for n in PEOPLE])
    with pytest.raises(UserError, match=r"nothing is left of 8 .*missing_field:name 8.*seeds.jsonl:1/ask"):
        synth(tmp_path / "out", seeds=path, templates=[ASK])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "either 'seeds'"),
        ({"count": 1, "seeds": "x"}, "either 'seeds'"),
        ({"count": 1, "data": "x"}, "'data' needs 'seeds'"),
        ({"count": 1}, "no 'endpoint'"),
        ({"count": 1, "templates": []}, "templates"),
        ({"count": 1, "templates": [ASK, ASK]}, "two templates are named 'ask'"),
        ({"count": 1, "templates": [ASK | {"promt": "x"}]}, "did you mean 'prompt'"),
        ({"count": 1, "templates": [ASK | {"prompt": "{{ name"}]}, "not a Jinja template"),
        ({"count": 1, "templates": [ASK | {"task": "documents"}]}, "task"),
        ({"count": 1, "templates": [{"prompt": "x", "json_schema": {"type": "a"}}]}, "not a JSON schema"),
        ({"count": 1, "templates": [ASK | {"json_schema": {}}]}, "belong to an endpoint's answer"),
        ({"count": 1, "endpoint": {"url": "nowhere"}}, "not an address"),
        ({"count": 1, "endpoint": {"url": "http://me:secret@h/v1"}}, "holds a password"),
    ],
)
def test_a_mistake_in_the_recipe_is_a_sentence(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        recipe(tmp_path / "out", **fields)
    assert "secret" not in str(caught.value)


def test_seeds_of_all_forms_are_equal(tmp_path: Path) -> None:
    jsonl = "".join(f'{{"name": "{n}", "born": "{i}"}}\n' for i, n in enumerate(PEOPLE)).encode()
    (tmp_path / "a.jsonl").write_bytes(jsonl)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl.zst").write_bytes(zstandard.compress(jsonl))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl))
    found = []
    for number, word in enumerate((f"{tmp_path}/a.jsonl", f"jsonl:{tmp_path}/a.jsonl.gz", f"{tmp_path}/b")):
        made = synth(tmp_path / str(number), seeds=word, templates=[ASK])
        chats = read_records(made.file("conversations/train.jsonl"), Conversation)
        found.append([c.messages for c in chats])
    assert len(found[0]) == 8 and found[0] == found[1] == found[2]


def test_missing_seeds_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        synth(tmp_path / "out", seeds=str(tmp_path / "none.jsonl"), templates=[ASK])
