"""CI's own tools: a skipped test fails there, and the table of rooms counts right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

def test_runs():
    pass

@pytest.mark.skip(reason="no such device")
def test_skipped():
    pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with our conftest and one skipped test."""
    (tmp_path / "core").mkdir()
    (tmp_path / "core/test_planted.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def run_pytest(project: Path, ci: str, *words: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    env = own | {"CI": ci, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_skip_fails_in_ci(project: Path, words: tuple[str, ...]) -> None:
    done = run_pytest(project, "1", *words)
    assert done.returncode == 1, done.stdout
    assert "test_skipped: Skipped: no such device" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_skip_is_fine_elsewhere(project: Path) -> None:
    assert run_pytest(project, "").returncode == 0


@pytest.mark.slow
def test_the_table_of_rooms(project: Path) -> None:
    run_pytest(project, "", "--junitxml=junit-test.xml")
    (project / "core/test_planted.py").write_text("def test_wrong():\n    assert False\n")
    run_pytest(project, "", "--junitxml=junit-e2e.xml")
    command = [sys.executable, str(ROOT / ".ci/rooms.py"), "junit-test.xml", "junit-e2e.xml"]
    lines = subprocess.run(
        command, cwd=project, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:4] for line in lines[1:-1]}
    assert (
        rows["core"] == ["1", "0", "1"]
        and rows["e2e"] == ["0", "1", "0"]
        and rows["serve"] == ["0", "0", "0"]
    )
    assert lines[-1].startswith("1 passed, 1 failed, 1 skipped in ")
