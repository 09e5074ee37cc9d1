"""`lineage`, `runs` and `doctor` from the command line."""

import json
from pathlib import Path

import pytest
from toy_stages import DoubleRecipe, TextRecipe, double, write_text

from microlm.cli import inspect, main


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_text(TextRecipe(out="runs/q/data"))
    double(DoubleRecipe(source="runs/q/data", out="runs/q/model"))
    return tmp_path / "runs"


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(list(words))
    return int(e.value.code or 0)


def test_lineage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("lineage", "runs/q") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("model  model  digest ") and out[0].endswith("  ok")
    assert out[1].startswith("└─ source: data  data  digest ")
    (run / "q/data/documents/a.txt").write_bytes(b"hellO")
    assert call("lineage", "runs/q/model") == 1
    out, err = capsys.readouterr()
    assert "DAMAGED" in out and "documents/a.txt: changed" in out
    assert err.startswith("damaged: ") and err.strip().endswith("runs/q/data: documents/a.txt: changed")
    assert call("lineage", "runs/q/model", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == 1 and told["ok"] is False
    assert call("lineage", "runs/none") == 2


def test_runs_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("runs", "list") == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [
        ["q/data", "data", "finished"], ["q/model", "model", "finished"],
    ]  # fmt: skip
    assert call("runs", "list", "runs", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == 1 and {r["name"] for r in told["runs"]} == {"q/data", "q/model"}
    assert call("runs", "list", "nowhere") == 2


def test_runs_list_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert call("runs", "list") == 0
    assert "no runs yet" in capsys.readouterr().err


def test_runs_rm(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("runs", "rm", "q/data") == 2
    assert "was made from it" in capsys.readouterr().err
    assert call("runs", "rm", "runs/q/model", "--json") == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [str(run / "q/model")]
    assert call("runs", "rm", "q/data") == 0 and not (run / "q").exists()


def test_runs_gc(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "q/x.tmp/resume").mkdir(parents=True)
    (run / "q/x.tmp/resume/key").touch()
    (run / "q/x.tmp/f").write_bytes(b"123")
    assert call("runs", "gc") == 0
    out, err = capsys.readouterr()
    assert "would delete runs/q/x.tmp  3 B" in out and "1 leftover, 3 B" in err
    assert (run / "q/x.tmp").exists()
    assert call("runs", "gc", "--yes", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["deleted"] and told["bytes"] == 3 and not (run / "q/x.tmp").exists()


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("doctor", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    names = {"python", "torch", "bf16", "cores", "memory", "compiler", "cache"}
    assert told["schema"] == 1 and told["ok"] and names <= {c["name"] for c in told["checks"]}
    monkeypatch.setattr(
        inspect, "_checks", lambda: [inspect.Check("torch", "not installed", False, "pip install torch")]
    )
    assert call("doctor") == 1
    assert "MISSING" in capsys.readouterr().out
