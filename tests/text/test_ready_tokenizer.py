"""The tokenizer that comes with the package: whole, usable by name, and made from what its manifest says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ready_corpus
from artifacts import write_data
from transformers import AutoTokenizer

from microlm.core import lineage, manifest
from microlm.core.manifest import open_artifact
from microlm.text import shards
from microlm.text.tokenizer import MARKS, SPECIAL, Tokenizer, reserved
from microlm.text.vocab import stage

READY = "builtin:zh-6400"


def test_it_is_whole_and_names_its_sources_and_licences() -> None:
    ready = open_artifact(READY)
    assert not manifest.damages(ready)
    tables = (ready_corpus.PROSE, ready_corpus.ENGLISH, ready_corpus.CHAT)
    assert set(ready.manifest["licences"]) == {licence for t in tables for licence, _ in t.values()}
    named = {word.rpartition("/")[2].removesuffix(".jsonl") for word in ready.manifest["recipe"]["source"]}
    assert named == {ready_corpus.file_name(source) for table in tables for source in table}


def test_it_loads_everywhere_with_the_same_ids() -> None:
    ready = open_artifact(READY)
    tokenizer, theirs = Tokenizer.load(ready.path), AutoTokenizer.from_pretrained(str(ready.path))
    assert tokenizer.vocab_size == 6400
    assert list(tokenizer.control) == [*SPECIAL, *MARKS, *reserved(7)]
    for text in ("床前明月光，疑是地上霜。", "def f(x):\n    return x + 2026\n", "龘 emoji 👩🏽‍🚀 é ﬁ", ""):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    turns = [{"role": "user", "content": "你好"}]
    assert "You are MicroLM" in theirs.apply_chat_template(turns, tokenize=False)


def test_a_pipeline_takes_it_by_name(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    made = shards.run(
        shards.TokenizeRecipe(out=str(tmp_path / "shards"), data=str(data.path), tokenizer=READY)
    )
    assert made.manifest["inputs"]["tokenizer"]["path"] == READY
    assert json.loads((made.path / "index.json").read_bytes())["vocab_size"] == 6400
    assert lineage.is_intact([lineage.tree(made.url, verify=True)])


@pytest.mark.shared
@pytest.mark.slow
def test_made_again_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready_corpus.write(tmp_path / "ready")
    monkeypatch.chdir(tmp_path)
    recipe = open_artifact(READY).manifest["recipe"]
    again = stage.run(stage.TokenizerRecipe(**(recipe | {"out": "again"})))
    assert again.digest == open_artifact(READY).digest
