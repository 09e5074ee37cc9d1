"""The house keeps its contracts, and each contract is shown to fail on a planted violation."""

import tomllib
from pathlib import Path

import checks
import pytest

PACKAGE = Path(__file__).parents[2] / "microlm"
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# place → reason; a place that is not too large any more must leave the list
ALLOWED: dict[str, str] = {
    "microlm/engine/engine.py:__init__": "each option of the engine is an argument of it",
    "microlm/core": "every later room reads the cellar by these names; artifact and client are split in two",
    "microlm/cli/answers/chat.py:chat": "each option of the command is an argument of the function",
    "microlm/cli/answers/generate.py:generate": "each option of the command is an argument of the function",
    "microlm/cli/serve.py:serve": "each option of the command is an argument of the function",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "microlm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / "microlm"


def test_imports_go_downstairs() -> None:
    assert checks.layers(PACKAGE) == []


def test_imports_are_declared() -> None:
    assert checks.undeclared(PACKAGE, PROJECT) == []


def test_sizes_are_kept() -> None:
    assert checks.sizes(PACKAGE, ALLOWED) == []


def test_nothing_forbidden_is_used() -> None:
    assert checks.forbidden(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/a.py", "import microlm.text.chat"),
        ("core/a.py", "from microlm import text"),
        ("text/a.py", "def f():\n    from microlm.model import config"),
        ("model/a.py", "if False:\n    from microlm.text.chat import render"),
        ("train/a.py", "from ..engine import engine"),
        ("train/deep/a.py", "from ...engine.engine import Engine"),
        ("engine/a.py", "import importlib\nimportlib.import_module('microlm.train.loop')"),
        ("eval/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from microlm.cli import run"),
        ("utils/a.py", "from microlm.core import errors"),
        ("__init__.py", "from microlm.engine import Engine"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path: Path, file: str, text: str) -> None:
    package = plant(tmp_path, {file: text, "text/__init__.py": "", "utils/__init__.py": ""})
    assert len(checks.layers(package)) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cli/a.py", "from microlm.eval import score\nfrom microlm import __version__"),
        ("cli/a.py", "from microlm.cli import run\nfrom . import stages"),
        ("train/a.py", "from microlm.model import config\nfrom ..core import errors\nimport torch"),
        ("__main__.py", "from microlm.cli import main"),
    ],
)
def test_downward_imports_are_fine(tmp_path: Path, file: str, text: str) -> None:
    assert checks.layers(plant(tmp_path, {file: text})) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import requests", "requests undeclared"),
        ("def f():\n    from pandas.io import json", "pandas undeclared"),
        ("import importlib\nimportlib.import_module('scipy.stats')", "scipy undeclared"),
        ("import pytest", "pytest undeclared"),
        ("import datasets", "datasets comes with an extra"),
        ("from datasets import load_dataset", "datasets comes with an extra"),
    ],
)
def test_a_planted_undeclared_import_is_found(tmp_path: Path, text: str, told: str) -> None:
    (found,) = checks.undeclared(plant(tmp_path, {"core/a.py": text}), PROJECT)
    assert told in found


@pytest.mark.parametrize(
    "text",
    [
        "import json, yaml, torch.nn",
        "from . import b\nfrom microlm.core import c",
        "def f():\n    import datasets",
    ],
)
def test_declared_imports_are_fine(tmp_path: Path, text: str) -> None:
    assert checks.undeclared(plant(tmp_path, {"core/a.py": text}), PROJECT) == []


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"core/a.py": "x = 1\n" * 351}, "core/a.py: 351 lines"),
        ({"core/a.py": "def f():\n" + "    x = 1\n" * 60}, "core/a.py:f: 61 lines"),
        (
            {"core/a.py": "class A:\n    def f(self, a, b, c, d, e, *, f, g, h, i): ..."},
            "a.py:f: 9 arguments",
        ),
        ({f"core/m{i}.py": "" for i in range(13)}, "core: 13 files"),
    ],
)
def test_a_planted_large_thing_is_found(tmp_path: Path, files: dict[str, str], told: str) -> None:
    found = checks.sizes(plant(tmp_path, files), {})
    assert len(found) == 1 and told in found[0]


def test_the_allow_list_allows_and_expires(tmp_path: Path) -> None:
    package = plant(
        tmp_path, {"core/a.py": "x = 1\n" * 351, "core/b.py": "def f(self, a, b, c, d, e, g, h, i): ..."}
    )
    assert checks.sizes(package, {"microlm/core/a.py": "a reason"}) == []
    assert "take it off" in checks.sizes(package, {"microlm/core/a.py": "r", "microlm/core/b.py": "r"})[0]
    assert all(len(reason) > 10 for reason in ALLOWED.values())


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/a.py", "import pickle"),
        ("core/a.py", "def f():\n    from joblib import load"),
        ("model/a.py", "import torch\ntorch.load('x')"),
        ("model/a.py", "from torch import load"),
        ("export/a.py", "AutoModel.from_pretrained('x', trust_remote_code=True)"),
        ("export/a.py", "load('x', trust_remote_code=flag)"),
        ("core/a.py", "eval('1')"),
        ("core/a.py", "exec('1')"),
        ("core/a.py", "import subprocess\nsubprocess.run('ls', shell=True)"),
        ("core/a.py", "import os\nos.system('ls')"),
        ("core/a.py", "import os\nx = os.environ['A']"),
        ("core/a.py", "import os\nx = os.getenv('A')"),
        ("core/a.py", "from os import environ"),
        ("core/a.py", "print('x')"),
        ("text/a.py", "numpy.load('x', allow_pickle=True)"),
        ("core/a.py", "try:\n    f()\nexcept:\n    pass"),
    ],
)
def test_a_planted_forbidden_construct_is_found(tmp_path: Path, file: str, text: str) -> None:
    found = checks.forbidden(plant(tmp_path, {file: text}))
    assert len(found) == 1 and found[0].startswith(f"microlm/{file}:")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cli/a.py", "print('x')"),
        ("core/runtime.py", "import os\nx = os.environ.get('A')"),
        ("model/a.py", "model.eval()\nimport re\nre.compile('x')\ntorch.compile(f)"),
        ("core/a.py", "subprocess.run(['ls'], shell=False)\n# eval( in a comment, pickle too"),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path: Path, file: str, text: str) -> None:
    assert checks.forbidden(plant(tmp_path, {file: text})) == []
