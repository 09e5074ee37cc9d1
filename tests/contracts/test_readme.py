"""The documents say what is true: commands exist, English and Chinese agree, CI runs what is promised."""

import re
import shlex
from pathlib import Path

import pytest
import typer.core
import typer.main
from checks import placeholders

from microlm.cli import main, make_app
from microlm.cli.run import build_all, plan_of
from microlm.core.errors import UserError

ROOT = Path(__file__).parents[2]
PAIRS = [
    ("README.md", "README.zh.md"),
    ("docs/quickstart.md", "docs/quickstart.zh.md"),
    ("docs/data.md", "docs/data.zh.md"),
    ("docs/tokenizer.md", "docs/tokenizer.zh.md"),
    ("docs/pretraining.md", "docs/pretraining.zh.md"),
    ("docs/engine.md", "docs/engine.zh.md"),
    ("docs/post_training.md", "docs/post_training.zh.md"),
    ("docs/adapting.md", "docs/adapting.zh.md"),
]
DOCUMENTS = [name for pair in PAIRS for name in pair] + ["CONTRIBUTING.md"]
LINKED = [*DOCUMENTS, "SECURITY.md", "CHANGELOG.md", "docs/architecture.md"]
SH = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHERS = ("git", "cd", ".", ".venv/bin/pre-commit")


def commands(text: str) -> list[str]:
    """The lines of the `sh` blocks."""
    return [line for block in SH.findall(text) for line in block.splitlines() if line.strip()]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def targets(makefile: str) -> dict[str, list[str]]:
    """Target → its prerequisites."""
    rules = re.findall(r"^([a-z0-9]+):([^#\n=]*)", makefile, re.MULTILINE)
    return {name: needed.split() for name, needed in rules}


def find_command(words: list[str]) -> tuple[list[str], typer.core.TyperCommand]:
    """The leading words that name a command, and the command; KeyError when there is none."""
    node = typer.main.get_command(make_app())
    path: list[str] = []
    while isinstance(node, typer.core.TyperGroup):
        if len(path) == len(words):
            raise KeyError(" ".join(["microlm", *words]))
        node = node.commands[words[len(path)]]
        path.append(words[len(path)])
    assert isinstance(node, typer.core.TyperCommand)
    return path, node


def check_microlm(words: list[str]) -> None:
    """Fail unless the command, its options and its recipe's fields exist."""
    path, command = find_command(words)
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    rest = words[len(path) :]
    assert {w.partition("=")[0] for w in rest if w.startswith("--")} <= known
    if any(parameter.name == "recipe" for parameter in command.params):
        recipe, *overrides = [w for w in rest if not w.startswith("-")]
        build_all(plan_of(ROOT / recipe if recipe.endswith(".yaml") else Path(recipe), overrides), recipe)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_english_and_chinese_have_the_same_code(english: str, chinese: str) -> None:
    fences = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    assert fences.findall(read(english)) == fences.findall(read(chinese)) != []


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_english_and_chinese_have_the_same_figures(english: str, chinese: str) -> None:
    def cells(name: str) -> list[list[str]]:
        rows = re.findall(r"^\|(.*)\|$", read(name), re.MULTILINE)
        return [re.findall(r"(?<![\w.])\d*\.?\d+(?![\w.])", row) for row in rows]

    assert cells(english) == cells(chinese)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_exists(name: str) -> None:
    made = targets(read("Makefile"))
    for line in commands(read(name)):
        program, *words = shlex.split(line)
        if program == "microlm":
            check_microlm(words)
        elif program == "make":
            assert {w for w in words if "=" not in w} <= made.keys(), line
        else:
            assert program in OTHERS, line


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        shlex.split(line)[1:] for name in DOCUMENTS for line in commands(read(name)) if "microlm " in line[:8]
    ]
    for path in sorted({tuple(find_command(words)[0]) for words in lines}):
        with pytest.raises(SystemExit) as e:
            main([*path, "--help"])
        assert not e.value.code
        assert f"microlm {' '.join(path)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("microlm nothing", KeyError),
        ("microlm runs", KeyError),
        ("microlm serve runs/quickstart --prot 1", AssertionError),
        ("microlm run recipes/none.yaml", UserError),
        ("microlm run recipes/quickstart.yaml data.sorce=factbook", UserError),
    ],
)
def test_a_planted_mistake_is_found(line: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_microlm(shlex.split(line)[1:])


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    first = SH.findall(read("README.md"))[0].splitlines()
    assert [line for line in first if line.startswith("make ")] == ["make quickstart", "make test"]
    steps = re.findall(r"^step \d+ (make \w+)$", read(".ci/run"), re.MULTILINE)
    assert steps == ["make setup", "make test", "make e2e"]
    made = targets(read("Makefile"))
    assert "quickstart" in made["e2e"]
    assert "microlm run recipes/quickstart.yaml" in read("Makefile")


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_somewhere(name: str) -> None:
    place = (ROOT / name).parent
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", read(name)):
        target = place / link[0] if link[0] else ROOT / name
        assert target.exists(), link
        if link[1]:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert link[1][1:] in {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in heads}, link


def test_nothing_is_left_to_be_written_or_measured() -> None:
    documents = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
    assert len(documents) >= len(LINKED)
    assert {p.name: found for p in documents if (found := placeholders(p.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize("text", ["| TBM-wall | s |", "TODO: write", "<!-- FIXME -->", "数字（TBD）"])
def test_a_planted_placeholder_is_found(text: str) -> None:
    assert len(placeholders(text)) == 1


def test_every_document_is_free_of_machine_paths() -> None:
    for name in [*LINKED, "Makefile", "constraints.txt", ".ci/run", ".pre-commit-config.yaml"]:
        assert not re.search(r"/work/|/root/|/home/|/opt/|file://", read(name)), name
