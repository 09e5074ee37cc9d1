"""Broken corpora, recipes and artifacts through the real command line: one sentence, or a counted drop."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bad_artifacts import ARTIFACTS, merge
from bad_corpora import CORPORA, COUNTED
from bad_models import MODELS, one_prompt
from bad_recipes import RECIPES
from broken_house import (
    CORPUS,
    Prepare,
    Room,
    fail_at,
    fill_disk,
    lock_folder,
    make_room,
    plain_web_server,
    write_run,
)

from microlm.cli import main
from microlm.core.artifact import open_artifact
from microlm.model import directory

NEXT_STEP = re.compile(r"; \w|, (expected|give|write|choose)|expected |did you mean|known: ")
PREFIX = {1: ("check failed: ", "damaged: "), 2: ("error: ",)}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("house") / "runs")


@pytest.fixture
def room(finished_run: Path, tmp_path: Path) -> Iterator[Room]:
    with make_room(finished_run, tmp_path) as made:
        yield made


def call(words: list[str]) -> int:
    with pytest.raises(SystemExit) as e:
        main(words)
    return int(e.value.code or 0)


# ---- a broken line or file: dropped and counted


@pytest.mark.parametrize("kind", COUNTED)
def test_what_is_dropped_is_counted(room: Room, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, data, reason = COUNTED[kind]
    words = room.corpus(data, name)
    assert call(words) == 0, capsys.readouterr().err
    audit = json.loads(Path("out/data/logs/audit.json").read_bytes())
    read = audit["steps"]["read"]
    assert {r["reason"]: r["records"] for r in read["reasons"]} == {reason: 1}
    assert read["reasons"][0]["examples"][0].startswith(f"{name}:")
    dropped = sum(step["dropped"] for step in audit["steps"].values())
    accepted = sum(n for splits in audit["written"].values() for n in splits.values())
    assert accepted + dropped == read["read"] and accepted > 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_byte_order_mark_is_no_fault(room: Room) -> None:
    assert call(room.corpus(b"\xef\xbb\xbf" + CORPUS)) == 0
    read = json.loads(Path("out/data/logs/audit.json").read_bytes())["steps"]["read"]
    assert (read["read"], read["kept"]) == (9, 9)


# ---- what cannot go on: one sentence

CASES = {
    f"{group}: {kind}": case
    for group, table in {"corpus": CORPORA, "recipe": RECIPES, "artifact": ARTIFACTS, "model": MODELS}.items()
    for kind, case in table.items()
}


def require_one_sentence(err: str, code: int, says: str) -> str:
    """Exactly one line is an error; it names the place and a next step, and nothing is a traceback."""
    told = [line for line in err.splitlines() if line.startswith(PREFIX[code])]
    assert len(told) == 1 and err.splitlines()[-1] == told[0], err
    assert "Traceback" not in err
    sentence = told[0].partition(": ")[2]
    assert re.search(says, sentence), sentence
    assert code == 1 or NEXT_STEP.search(sentence), f"no next step: {sentence}"
    assert sentence.isprintable() and len(sentence) < 600, sentence
    return sentence


def require_nothing_left(room: Room, before: dict[str, str]) -> None:
    """No finished file changed, and what is new lies in a `.tmp` folder."""
    after = room.files()
    assert {name: after.get(name) for name in before} == before
    new = [name for name in after if name not in before]
    assert not [n for n in new if not any(part.endswith(".tmp") for part in Path(n).parts)], new


@pytest.mark.parametrize("kind", CASES)
def test_what_is_broken_is_one_sentence(room: Room, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, says = CASES[kind]
    words = prepare(room)
    before = room.files()
    capsys.readouterr()
    code = call(words)
    out, err = capsys.readouterr()
    assert code == 2, err
    require_one_sentence(err, 2, says)
    assert out == ""
    require_nothing_left(room, before)


def test_there_are_more_than_forty_kinds() -> None:
    assert len(CASES) + len(COUNTED) + len(DISKS) >= 100


# ---- a check that failed: exit code 1


@pytest.mark.parametrize(
    "name",
    [
        "data/documents/train.jsonl",
        "tokenizer/tokenizer.json",
        "shards/documents-train.tokens.bin",
        "shards/index.json",
        "sft/model.safetensors",
        "sft/config.json",
        "sft/tokenizer.json",
        "lora/adapter_model.safetensors",
        "scores/scores.json",
        "data/logs/audit.json",
    ],
)
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_lineage_finds_a_flipped_byte(
    room: Room, name: str, at: float, capsys: pytest.CaptureFixture[str]
) -> None:
    room.flip(f"runs/{name}", at)
    assert call(["lineage", "runs"]) == 1
    out, err = capsys.readouterr()
    require_one_sentence(err, 1, f"runs/{name.replace('/', ': ', 1)}: changed")
    assert "DAMAGED" in out


@pytest.mark.slow
def test_lineage_finds_a_flipped_byte_anywhere_in_a_manifest(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    path = room.path / "runs/scores/manifest.json"
    data = path.read_bytes()
    for i in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        assert call(["lineage", "runs/scores"]) in (1, 2), (i, data[max(0, i - 20) : i + 20])
        err = capsys.readouterr().err
        assert "runs/scores" in err and "manifest.json" in err and "Traceback" not in err


def test_chat_with_a_plain_web_server(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    with plain_web_server() as url:
        assert call(["chat", url]) == 2
    require_one_sentence(capsys.readouterr().err, 2, r"/v1/models: the answer is not .*OpenAI")


def test_verify_of_a_plain_web_server_fails_line_by_line(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    with plain_web_server() as url:
        assert call(["verify", url]) == 1
    out, err = capsys.readouterr()
    require_one_sentence(err, 1, r"verify: \d+ of 12 checks failed \(models, chat")
    assert "pass         chat" not in out


# ---- disks that refuse

FULL, READ_ONLY, DENIED = errno.ENOSPC, errno.EROFS, errno.EACCES
FULL_DISK = "(out|runs|recipe).*: the disk is full; free some space"
TOKENIZER: dict[str, Any] = {"data": "runs/data", "vocab_size": 300}


def data(room: Room) -> list[str]:
    return room.corpus(CORPUS)


def tokenizer(room: Room) -> list[str]:
    return room.stage("tokenizer", **TOKENIZER)


Refuse = Callable[[pytest.MonkeyPatch], None]

# kind → (the stage that runs, how the disk refuses, what the sentence says)
DISKS: dict[str, tuple[Prepare, Refuse, str]] = {
    "full at the last rename": (data, partial(fail_at, owner=Path, name="rename", code=FULL), FULL_DISK),
    "full under the tokenizer": (tokenizer, partial(fill_disk, bytes_left=500), FULL_DISK),
    "full under the weights": (
        merge,
        partial(fail_at, owner=directory, name="save_file", code=FULL),
        FULL_DISK,
    ),
    "full under copies": (merge, partial(fail_at, owner=shutil, name="copyfile", code=FULL), FULL_DISK),
    "read-only": (
        data,
        partial(lock_folder, name="out", code=READ_ONLY),
        "out.*: the file system is read-only; choose",
    ),
    "no permission": (
        data,
        partial(lock_folder, name="out", code=DENIED),
        "out.*: permission denied; change",
    ),
}
DISKS |= {
    f"full after {n} bytes": (data, partial(fill_disk, bytes_left=n), FULL_DISK)
    for n in (0, 70, 300, 900, 1500, 4000)
}
DISKS |= {
    f"full at fsync {n}": (data, partial(fail_at, owner=os, name="fsync", code=FULL, after=n), FULL_DISK)
    for n in (0, 1, 5, 15)
}


@pytest.mark.parametrize("kind", DISKS)
def test_a_disk_that_refuses_is_one_sentence_and_the_next_run_finishes(
    room: Room, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, refuse, says = DISKS[kind]
    words = prepare(room)
    assert call([*words, "output=undisturbed"]) == 0
    before = room.files()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch)
        code = call(words)
    out, err = capsys.readouterr()
    assert code == 2, err
    require_one_sentence(err, 2, says)
    assert out == ""
    require_nothing_left(room, before)
    assert call(words) == 0
    made = next((room.path / "out").iterdir())
    assert open_artifact(str(made)).digest == open_artifact("undisturbed").digest


@pytest.mark.parametrize("n", [0, 900, 4000])
def test_a_full_disk_leaves_the_earlier_artifact(
    room: Room, n: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = room.corpus(CORPUS)
    assert call(words) == 0
    before = room.files()
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, n)
        assert call([*words, "seed=5"]) == 2
    require_one_sentence(capsys.readouterr().err, 2, "the disk is full")
    require_nothing_left(room, before)


def test_generate_leaves_no_half_answers_file(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*one_prompt(room, '{"prompt": "b"}\n'), "--max-new-tokens", "2", "--out", "o.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, os, "fsync", FULL, 2)
        assert call(words) == 2
    require_one_sentence(capsys.readouterr().err, 2, r"o\.jsonl.*: the disk is full; free")
    assert not Path("o.jsonl").exists()
    assert call(words) == 0 and len(Path("o.jsonl").read_text().splitlines()) == 2
