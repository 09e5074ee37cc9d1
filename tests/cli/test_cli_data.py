"""`data audit` and `data show` from the command line: exit codes, names of records, one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from microlm.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty poems for training, of which two are held out as well."""
    monkeypatch.chdir(tmp_path)
    poems = [
        {"text": f"第{n}首诗，第{n * n}个字，{chr(0x4E00 + 7 * n) * 9}", "source": f"集{n}"}
        for n in range(44)
    ]
    for name, some in (("train", poems[:40]), ("validation", poems[38:])):
        path = tmp_path / "data/documents" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in some), encoding="utf-8")
    chats = tmp_path / "data/conversations/train.jsonl"
    chats.parent.mkdir()
    turns = [{"role": "user", "content": "谁？\x1b[2J"}, {"role": "assistant", "content": "李白。" * 500}]
    chats.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    return tmp_path


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(["data", *words])
    return int(e.value.code or 0)


def test_a_gate_that_fails_names_records_and_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("audit", "data", "--fail-on", "leakage>0,mask_errors>0", "--no-near") == 2
    assert "mask_errors>0: is not measured without --tokenizer" in capsys.readouterr().err
    assert call("audit", "data", "--fail-on", "leakage>0,duplicates>0") == 1
    out, err = capsys.readouterr()
    assert "leakage                2 (documents 2)" in out.splitlines()
    assert "documents/validation.jsonl:1 (集38) = documents/train.jsonl:39 (集38)" in err
    assert "check failed: leakage is 2\n" in err and "duplicates>0" not in err
    assert call("audit", "data", "--fail-on", "leakage>2", "--fail-on", "duplicates>0") == 0
    assert call("audit", "data", "--fail-on", "lekage>0") == 2
    assert "did you mean 'leakage'?" in capsys.readouterr().err
    assert call("audit", "nowhere") == 2
    assert call("audit", "data", "--tokenizer", "nowhere") == 2


def test_json_and_page_say_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("audit", "data", "--json", "--out", "audit.html", "--fail-on", "leakage>0") == 1
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    assert told["gates"] == [{"gate": "leakage>0", "name": "leakage", "value": 2, "failed": True}]
    html = (folder / "audit.html").read_text(encoding="utf-8")
    assert "FAILED" in html and "documents/train.jsonl:39 (集38)" in html


def test_files_are_named_by_split(capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"{s}=data/documents/{s}.jsonl" for s in ("train", "validation")]
    assert call("audit", *files, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [p["part"] for p in told["parts"]] == ["train", "validation"] and told["numbers"]["leakage"] == 2


def test_show_draws_by_seed(capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(*words: str) -> list[str]:
        assert call("show", "data", "--json", *words) == 0
        return [r["place"] for r in json.loads(capsys.readouterr().out)["records"]]

    assert drawn() == drawn() and len(set(drawn())) == 5
    assert drawn("--seed", "1") != drawn()
    assert drawn("--n", "100") == [f"documents/train.jsonl:{n}" for n in range(1, 41)]
    assert drawn("--contains", "第7首") == ["documents/train.jsonl:8"]
    assert drawn("--split", "validation", "--n", "1")[0].startswith("documents/validation.jsonl:")
    places = {p for seed in range(40) for p in drawn("--n", "1", "--seed", str(seed))}
    assert len(places) > 20  # every record has its chance, not the first ones


def test_show_is_readable_and_obeys_no_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", "data", "--kind", "conversations") == 0
    out = capsys.readouterr().out
    assert "谁？\\x1b[2J" in out and "\x1b" not in out and "(500 more characters)" in out
    assert max(map(len, out.splitlines())) <= 100


def test_show_says_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["--kind", "document"], "did you mean 'documents'?"),
        (["--split", "test"], "--split test: is not there"),
        (["--kind", "conversations", "--split", "validation"], "there is no such part"),
        (["--contains", "杜甫"], "holds no record that contains '杜甫'"),
    ):
        assert call("show", "data", *words) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", ["audit", "show"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert f"microlm data {command} runs/quickstart/data" in capsys.readouterr().out
