"""Stage `tokenizer`: one corpus, one file, however it is shared out; a mistake is one sentence."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from artifacts import PROSE, TURNS, write_data, write_tokenizer
from bpe_blocks import theirs

from microlm.core.artifact import Artifact
from microlm.core.errors import UserError
from microlm.core.manifest import hash_file
from microlm.text import chat
from microlm.text.bpe.learn import passes
from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import MARKS, SPECIAL, Tokenizer, reserved
from microlm.text.vocab.stage import TokenizerRecipe, run

TESTS = Path(__file__).parents[1]
TRAIN = """
import sys
if "{numba}" == "no":
    sys.modules["numba"] = None
from microlm.text.vocab.stage import TokenizerRecipe, run
if __name__ == "__main__":
    run(TokenizerRecipe(out={out!r}, source={source!r}, **{fields!r}))
"""


def write_texts(path: Path, texts: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return f"jsonl:{path}"


def trained_on(out: Path, source: str | list[str], **fields: Any) -> Artifact:
    return run(TokenizerRecipe(out=str(out), source=source, **({"vocab_size": 500} | fields)))


def script(path: Path, numba: str, out: Path, source: str, fields: dict[str, Any]) -> list[str]:
    path.write_text(TRAIN.format(numba=numba, out=str(out), source=source, fields=fields))
    return [sys.executable, str(path)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(2)
    words = [word for line in PROSE for word in line.replace("，", "，|").split("|")]
    return ["".join(rng.choices(words, k=6)) for _ in range(300)]


def test_shards_order_and_processes_give_the_same_file(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained_on(tmp_path / "whole", write_texts(tmp_path / "whole.jsonl", texts))
    mixed = random.Random(4).sample(texts, len(texts))
    for i in range(3):
        write_texts(tmp_path / f"shards/{2 - i}.jsonl", mixed[100 * i : 100 * i + 100])
    monkeypatch.setattr(passes, "SMALL_BYTES", 0)
    monkeypatch.setattr(passes, "GROUP_BYTES", 1)
    digests = {hash_file(whole.path / "tokenizer.json")}
    for processes in (1, 2):
        made = trained_on(
            tmp_path / f"by-{processes}", f"jsonl:{tmp_path}/shards", parallel={"processes": processes}
        )
        digests.add(hash_file(made.path / "tokenizer.json"))
        assert made.digest == whole.digest
        report = json.loads((made.path / "logs/training.json").read_bytes())
        assert (report["processes"], report["texts"], report["records"]["kept"]) == (processes, 300, 300)
        assert report["cut"] <= report["last_count"]
    assert len(digests) == 1


def test_raw_sources_and_a_data_artifact_of_them_give_the_same_tokenizer(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", repeat=3)
    documents = write_texts(tmp_path / "documents.jsonl", list(PROSE) * 3)
    talks = tmp_path / "talks.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in TURNS
    ]
    talks.write_text("".join(json.dumps(line) + "\n" for line in lines * 3), "utf-8")
    ours = write_tokenizer(tmp_path / "a", data)
    raw = trained_on(tmp_path / "b", [f"jsonl:{talks}", documents], vocab_size=400, assistant_name=None)
    assert raw.digest == ours.digest
    assert ours.manifest["metrics"]["texts"] == raw.manifest["metrics"]["texts"] == 3 * (5 + 6)
    assert all(row["bytes_per_token"] is None for row in fertility(raw))
    assert any(row["bytes_per_token"] for row in fertility(ours))


def fertility(made: Artifact) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((made.path / "logs/fertility.json").read_bytes())
    return rows


def test_exact_mode_writes_what_tokenizers_learns(tmp_path: Path, texts: list[str]) -> None:
    made = trained_on(
        tmp_path / "t", write_texts(tmp_path / "t.jsonl", texts), mode="exact", pattern="qwen", digits="runs"
    )
    model = json.loads((made.path / "tokenizer.json").read_bytes())["model"]
    expected = theirs(texts, 500 - 256 - 16, Pieces("qwen", "runs"), 2)
    assert model["merges"] == expected["merges"]
    control = {token: i for i, token in enumerate((*SPECIAL, *MARKS, *reserved(7)))}
    assert model["vocab"] == control | {token: i + 16 for token, i in expected["vocab"].items()}


@pytest.mark.parametrize("count", [0, 7, 20])
def test_control_tokens_and_reserves_come_first(tmp_path: Path, texts: list[str], count: int) -> None:
    source = write_texts(tmp_path / "t.jsonl", texts)
    made = trained_on(tmp_path / "t", source, reserved=count, assistant_name="小微")
    control = (*SPECIAL, *MARKS, *reserved(count))
    config = json.loads((made.path / "tokenizer_config.json").read_bytes())
    described = {int(i): (t["content"], t["special"]) for i, t in config["added_tokens_decoder"].items()}
    assert described == {i: (token, token not in MARKS) for i, token in enumerate(control)}
    tokenizer = Tokenizer.load(made.path)
    assert tokenizer.control == {token: i for i, token in enumerate(control)}
    assert config["chat_template"] == chat.template_text("小微")
    assert (made.path / "chat_template.jinja").read_text("utf-8") == chat.template_text("小微")


@pytest.mark.parametrize("algorithm", ["unigram", "wordpiece", "sentencepiece"])
def test_other_algorithms_write_the_same_kind_of_directory(
    tmp_path: Path, texts: list[str], algorithm: str
) -> None:
    source = write_texts(tmp_path / "t.jsonl", texts)
    made = trained_on(tmp_path / "t", source, algorithm=algorithm)
    tokenizer = Tokenizer.load(made.path)
    assert set(tokenizer.control) >= {*SPECIAL, *MARKS, *reserved(7)}
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.encode(texts[0])
    assert (made.path / "tokenizer.model").exists() == (algorithm == "sentencepiece")
    assert json.loads((made.path / "logs/training.json").read_bytes())["algorithm"] == algorithm


def test_what_cannot_be_read_is_counted(tmp_path: Path, texts: list[str]) -> None:
    good = write_texts(tmp_path / "good.jsonl", texts)
    bad = write_texts(tmp_path / "bad.jsonl", [*texts[:20], 3, None, "", ["a"]])
    made = trained_on(tmp_path / "t", [good, bad])
    records = json.loads((made.path / "logs/training.json").read_bytes())["records"]
    assert (records["read"], records["kept"], sum(records["dropped"].values())) == (324, 320, 4)
    with pytest.raises(UserError, match="3 of 4 records cannot be used"):
        trained_on(tmp_path / "u", write_texts(tmp_path / "worse.jsonl", ["李白", 3, None, ""]))


def test_max_documents_takes_the_first_of_the_sources_in_order(tmp_path: Path, texts: list[str]) -> None:
    first = write_texts(tmp_path / "1.jsonl", texts[:40])
    second = write_texts(tmp_path / "2.jsonl", texts[40:])
    made = trained_on(tmp_path / "t", [second, first], max_documents=60)
    short = trained_on(tmp_path / "u", write_texts(tmp_path / "3.jsonl", texts[:60]))
    assert made.digest == short.digest


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "trained on data or on source; set one of the two"),
        ({"data": "DATA", "source": "SOURCE"}, "trained on data or on source; set one of the two"),
        ({"source": "factbook"}, "make a data artifact, and set data"),
        ({"source": "jsonl:nowhere.jsonl"}, "no such file"),
        ({"source": "SOURCE", "memory_mb": 100}, "set it to 256 or more"),
        ({"source": "SOURCE", "vocab_size": 260}, "set vocab_size to 272 or more"),
        ({"source": "SOURCE", "assistant_name": "{{"}, "assistant_name"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_artifact(
    tmp_path: Path, texts: list[str], fields: dict[str, Any], sentence: str
) -> None:
    source = write_texts(tmp_path / "t.jsonl", texts)
    data = write_data(tmp_path / "data")
    given = {"SOURCE": source, "DATA": str(data.path)}
    words = {k: given.get(v, v) for k, v in fields.items()}
    with pytest.raises(UserError, match=sentence):
        run(TokenizerRecipe(out=str(tmp_path / "out"), **words))
    assert not (tmp_path / "out").exists()


def test_without_numba_the_file_is_the_same_and_it_is_said(tmp_path: Path, texts: list[str]) -> None:
    source = write_texts(tmp_path / "t.jsonl", texts[:40])
    fields = {"vocab_size": 330}
    made = trained_on(tmp_path / "with", source, **fields)
    words = script(tmp_path / "train.py", "no", tmp_path / "without", source, fields)
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    said = "training a tokenizer: numba is not installed, so this runs as plain Python, far slower"
    assert done.stderr.count(said) == 1
    assert hash_file(made.path / "tokenizer.json") == hash_file(tmp_path / "without/tokenizer.json")


def test_ctrl_c_ends_at_once_and_leaves_no_counts(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "t.jsonl"
    write_texts(path, texts)
    block = path.read_bytes()
    with path.open("wb") as file:
        for _ in range(1 + (80 << 20) // len(block)):
            file.write(block)
    words = script(tmp_path / "train.py", "yes", tmp_path / "out", f"jsonl:{path}", {"vocab_size": 5000})
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    resume = tmp_path / "out.tmp/resume"
    wait_for(lambda: any(resume.glob("counts-*")))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    assert not list(resume.glob("counts-*"))
    assert not (tmp_path / "out").exists()


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
