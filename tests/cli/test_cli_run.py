"""`microlm run` and its exit codes, over two toy stages."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import toy_stages
import yaml

from microlm.cli import main, stages

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(stages.STAGES, "data", "toy_stages:TextRecipe:write_text")
    monkeypatch.setitem(stages.STAGES, "sft", "toy_stages:DoubleRecipe:double")
    monkeypatch.delitem(stages.TOOLS, "sft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MICROLM_DEBUG", raising=False)
    toy_stages.CALLS.clear()
    data = {
        "name": "toy",
        "seed": 3,
        "stages": [{"stage": "data", "text": "abc"}, {"stage": "sft", "name": "twice", "source": "data"}],
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(list(words))
    return int(e.value.code or 0)


def test_a_pipeline_runs_once(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", str(recipe), "--json") == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["schema"] == 1
    assert [(s["name"], s["kind"], s["skipped"], s["path"]) for s in told["stages"]] == [
        ("data", "data", False, "runs/toy/data"),
        ("twice", "model", False, "runs/toy/twice"),
    ]
    assert all(len(s["digest"]) == len(s["key"]) == 64 and s["seconds"] >= 0 for s in told["stages"])
    lines = err.splitlines()
    assert len(lines) == 2 and "done" in lines[0] and told["stages"][0]["digest"][:12] in lines[0]
    assert Path("runs/toy/twice/twice.txt").read_text() == "abcabc"
    assert call("run", str(recipe)) == 0
    out, err = capsys.readouterr()
    assert err.count("skipped") == 2 and "2 stages (2 skipped)" in out
    assert len(toy_stages.CALLS) == 2


def test_a_change_runs_what_depends_on_it(recipe: Path) -> None:
    call("run", str(recipe))
    assert call("run", str(recipe), "data.text=x", "parallel.processes=1") == 0
    assert len(toy_stages.CALLS) == 4 and Path("runs/toy/twice/twice.txt").read_text() == "xx"
    assert call("run", str(recipe), "data.text=x", "twice.seed=9") == 0
    assert len(toy_stages.CALLS) == 5


def test_dry_run_shows_and_runs_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", str(recipe), "output=elsewhere", "--dry-run") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert [s["name"] for s in shown] == ["data", "twice"]
    assert shown[1]["recipe"]["source"] == "elsewhere/data" and shown[1]["recipe"]["seed"] == 3
    assert call("run", str(recipe), "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"][0]["recipe"]["text"] == "abc"
    assert toy_stages.CALLS == [] and not Path("runs").exists()


def test_a_mistake_in_the_last_stage_stops_before_the_first(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", str(recipe), "twice.sorce=x") == 2
    assert "stage twice: unknown key 'sorce'; did you mean 'source'?" in capsys.readouterr().err
    assert toy_stages.CALLS == []


def test_one_stage_commands(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("data", "prepare", str(recipe)) == 0
    assert len(toy_stages.CALLS) == 1 and not Path("runs/toy/twice").exists()
    assert call("sft", str(recipe)) == 0
    assert Path("runs/toy/twice").exists()
    single = recipe.with_name("single.yaml")
    single.write_text("out: runs/alone\ntext: q\n")
    assert call("data", "prepare", str(single), "text=z") == 0
    assert Path("runs/alone/documents/a.txt").read_text() == "z"
    single.write_text("stage: data\nout: runs/alone2\n")
    assert call("run", str(single)) == 0
    capsys.readouterr()
    assert call("sft", str(single)) == 2
    assert "is a recipe of stage 'data', not 'sft'" in capsys.readouterr().err
    assert call("pretrain", str(recipe)) == 2
    assert "holds no stage of type 'pretrain'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fail", "code", "told"),
    [
        ("check", 1, "check failed: the text is not good enough"),
        ("interrupt", 130, "interrupted in stage 'data'; run the same command again to continue"),
        (str(errno.ENOSPC), 2, "the disk is full"),
        (str(errno.EACCES), 2, "permission denied"),
    ],
)
def test_failures_are_sentences_with_their_exit_code(
    recipe: Path, capsys: pytest.CaptureFixture[str], fail: str, code: int, told: str
) -> None:
    assert call("run", str(recipe), f"data.fail='{fail}'") == code
    out, err = capsys.readouterr()
    assert told in err and "Traceback" not in err and out == ""
    assert call("run", str(recipe)) == 0


def test_a_bug_keeps_its_traceback(recipe: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        main(["run", str(recipe), "data.fail=crash"])


@pytest.mark.parametrize("words", [("--debug", "run", "no.yaml"), ("run", "no.yaml", "--debug")])
def test_debug_shows_the_traceback(
    recipe: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert call("run", "no.yaml") == 2
    assert (
        capsys.readouterr().err
        == "error: no.yaml: no such recipe; recipes/ holds the ones that come with MicroLM\n"
    )
    assert call(*words) == 2
    assert "Traceback" in capsys.readouterr().err


def test_debug_by_environment(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROLM_DEBUG", "1")
    assert call("run", "no.yaml") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("runn",), "Did you mean 'run'"),
        (("run",), "Missing argument"),
        (("run", "x", "--jsn"), "No such option"),
        (("data", "prepar", "x"), "prepare"),
    ],
)
def test_usage_errors_exit_2(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str) -> None:
    assert call(*words) == 2
    assert told in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("microlm 0.")


def commands(app, words: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    from typer.main import get_command

    def walk(command, path):  # type: ignore[no-untyped-def]
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                yield from walk(child, (*path, name))
        else:
            yield path, command

    return list(walk(get_command(app), words))


def test_every_command_has_an_example_of_itself() -> None:
    from microlm.cli import make_app

    found = commands(make_app())
    assert len(found) >= 14
    for path, command in found:
        text = command.help or ""
        assert "Example" in text and f"microlm {' '.join(path)}" in text, (
            f"microlm {' '.join(path)}: no example"
        )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom microlm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pydantic', 'transformers', 'fastapi', 'numpy', 'rich', 'yaml', 'httpx'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.strip() == "[]" and "Usage: microlm" in done.stdout


def test_help_is_quick() -> None:
    command = [sys.executable, "-m", "microlm", "--help"]
    times = []
    for _ in range(5):  # processor time, the best of five: other work on the machine must not count
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3, times


def test_a_reader_that_leaves_is_no_error(recipe: Path) -> None:
    call("run", str(recipe))
    code = f"from microlm.cli import main; main(['runs', 'list', {str(recipe.parent / 'runs')!r}])"
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    os.close(write)
    assert done.stderr == "" and done.returncode == 0


def test_every_stage_of_the_table_is_there() -> None:
    import typing

    from microlm.core.recipe import StageRecipe

    for name in stages.STAGES:
        found = stages.load(name)
        assert issubclass(found.recipe, StageRecipe), name
        assert typing.get_type_hints(found.run.func.__wrapped__)["recipe"] is found.recipe, name  # type: ignore[attr-defined]
        assert len(found.recipe.model_fields) <= 20, name
        for field, info in found.recipe.model_fields.items():
            assert info.description, f"{found.recipe.__name__}.{field} has no description"
