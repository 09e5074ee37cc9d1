"""The wheel and the sdist: they build, hold what they must, run in an empty environment and folder."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from microlm.cli.recipes import find_recipe, recipe_names

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p.name for p in (ROOT / "recipes").glob("*.yaml"))
TABLES = [p.relative_to(ROOT).as_posix() for p in (ROOT / "microlm/text/sources/factbook").rglob("*.json*")]


def call(*words: str | Path, cwd: Path, **env: str) -> str:
    """Run a program; its stdout. A failure shows what it printed."""
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | env
    done = subprocess.run([*map(str, words)], cwd=cwd, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with sdist and wheel, the wheel built from the sdist, by the tools installed here."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment: MicroLM from the wheel, its dependencies from the running one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    wheel = next(dist.glob("*.whl"))
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin/python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    # a .pth in the new site-packages: the running environment's packages come after the wheel's own
    (site / "dependencies.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
    )
    return folder / "bin"


def test_a_bare_name_is_a_recipe_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("quickstart").samefile(ROOT / "recipes/quickstart.yaml")
    assert recipe_names() == [name.removesuffix(".yaml") for name in RECIPES]
    for word in ("none", "recipes/quickstart.yaml", "./quickstart", "quickstart.yaml", ""):
        assert find_recipe(word) == Path(word)
    Path("quickstart").write_text("stage: data\n")
    assert find_recipe("quickstart") == Path("quickstart")


@pytest.mark.slow
def test_the_wheel_holds_code_tables_and_recipes(dist: Path) -> None:
    names = set(zipfile.ZipFile(next(dist.glob("*.whl"))).namelist())
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "microlm").rglob("*.py")}
    assert TABLES and {*code, *TABLES, *(f"microlm/recipes/{name}" for name in RECIPES)} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"microlm"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.slow
def test_the_sdist_holds_all_that_builds_and_explains(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "pyproject.toml",
        "README.md",
        "README.zh.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
    }
    assert needed | {f"recipes/{name}" for name in RECIPES} <= names


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    microlm, cache = installed / "microlm", str(tmp_path / "cache")
    where = call(installed / "python", "-c", "import microlm; print(microlm.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "runs" in call(microlm, "--help", cwd=tmp_path)
    assert "torch" in call(microlm, "doctor", cwd=tmp_path, MICROLM_CACHE=cache)
    assert "stage: report" in call(microlm, "run", "quickstart", "--dry-run", cwd=tmp_path)
    assert [p for p in tmp_path.iterdir() if p.name != "cache"] == []
