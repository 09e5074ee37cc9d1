"""Datasets of both hubs, by their own libraries: from local folders, and over HTTP from a mirror of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_mirror import COMMIT, mirror

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.core.records import Conversation, Document, Message
from microlm.text import sources
from microlm.text.read import Drop, Record
from microlm.text.sources import Tally, hub

datasets = pytest.importorskip("datasets", reason="needs the extra 'hub'")

ASKED = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
ROWS: list[dict[str, Any]] = [
    {"text": "文", "messages": None, "license": "MIT"},
    {"text": None, "messages": ASKED, "license": None},
    {"text": None, "messages": None, "license": None},
]


def read(word: str) -> list[Record | Drop]:
    return [r for b in sources.blocks(sources.parse(word)) for r in sources.read_block(b)]


def check_rows(found: list[Record | Drop], label: str) -> None:
    document, conversation, empty = found
    assert document == Document("文", f"{label}:1", "MIT")
    assert conversation == Conversation(
        (Message("user", "问"), Message("assistant", "答")), source=f"{label}:2"
    )
    assert isinstance(empty, Drop) and empty.place == f"{label}:3" and empty.reason == "bad_messages"


@pytest.mark.parametrize("kind", ["hf", "ms"])
def test_a_folder_of_files_is_the_dataset(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "poems"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in ROWS[: 1 if split == "test" else 3]), encoding="utf-8"
        )
    check_rows(read(f"{kind}:{folder}"), "poems:train")
    assert read(f"{kind}:{folder}:test") == [Document("文", "poems:test:1", "MIT")]
    with pytest.raises(UserError, match=r"poems:none': cannot be loaded .*; check the name, the split"):
        read(f"{kind}:{folder}:none")
    assert set(sources.parse(f"{kind}:{folder}").fingerprint()) == {
        "kind",
        "split",
        "train.jsonl",
        "test.jsonl",
    }


def test_a_saved_dataset_is_its_rows(tmp_path: Path) -> None:
    held = datasets.Dataset.from_list(ROWS)
    held.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": held, "test": held.select([0])}).save_to_disk(tmp_path / "many")
    check_rows(read(f"hf:{tmp_path}/one"), "one:train")
    check_rows(read(f"hf:{tmp_path}/many"), "many:train")
    assert read(f"hf:{tmp_path}/many:test") == [Document("文", "many:test:1", "MIT")]


def test_the_parts_of_a_name() -> None:
    assert hub.parse_dataset("hf", "a/b") == hub.Dataset("hf", "a/b")
    whole = hub.parse_dataset("hf", "a/b/20231101.zh:test@v1.0")
    assert whole == hub.Dataset("hf", "a/b", "20231101.zh", "test", "v1.0")
    assert str(whole) == "hf:a/b/20231101.zh:test@v1.0"


MIRRORED = """
import json, sys
from microlm.text import sources
for word in sys.argv[1:]:
    source = sources.parse(word)
    records = [r for b in sources.blocks(source) for r in sources.read_block(b)]
    print(json.dumps([source.fingerprint(), [r.text for r in records], records[0].source]))
"""


def test_mirrors_pins_and_splits_over_http(tmp_path: Path) -> None:
    pytest.importorskip("modelscope", reason="needs the extra 'hub'")
    root = tmp_path / "poems"
    (root / "data").mkdir(parents=True)
    for split, texts in (("train", ["一", "二"]), ("test", ["三"])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / "data" / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    words = ["hf:owner/poems", "hf:owner/poems:test@" + COMMIT, "ms:owner/poems:test", "ms:owner/poems@v1"]
    with mirror(root) as server:
        env = {
            "HF_ENDPOINT": server.url,
            "MODELSCOPE_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "MODELSCOPE_CACHE": str(tmp_path / "ms"),
        }
        done = subprocess.run(
            [sys.executable, "-c", MIRRORED, *words],
            env=runtime.child_env(env),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    newest, pinned, test, tagged = (json.loads(line) for line in done.stdout.splitlines())
    assert newest == [
        {"dataset": "hf:owner/poems:train", "revision": COMMIT},
        ["一", "二"],
        "owner/poems:train:1",
    ]
    assert pinned == [{"dataset": "hf:owner/poems:test", "revision": COMMIT}, ["三"], "owner/poems:test:1"]
    assert test[1:] == [["三"], "owner/poems:test:1"] and len(test[0]["revision"]) == 64
    assert tagged[1] == ["一", "二"] and any("Revision=v1&" in path for path in server.asked)
    assert any(f"/resolve/{COMMIT}/data/train.jsonl" in path for path in server.asked)
    assert not any("/resolve/main/" in path for path in server.asked)


@pytest.mark.parametrize(("kind", "module"), [("hf", "datasets"), ("ms", "modelscope")])
def test_a_hub_dataset_without_the_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, kind: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"needs the extra 'hub': pip install 'microlm\[hub\]'"):
        list(sources.read(sources.parse(f"{kind}:owner/name:test"), Tally(), strict=False))


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path) -> None:
    code = "from microlm.text import sources; sources.parse('hf:owner/name').fingerprint()"
    env = runtime.child_env({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert "UserError: data.source 'hf:owner/name:train': cannot be loaded" in last
    assert last.endswith("check the name, the split, the revision and the network")
