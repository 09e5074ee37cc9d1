"""Every recipe in recipes/ is a plan whose every stage fits its recipe class."""

from pathlib import Path

import pytest

from microlm.cli.run import build_all, plan_of
from microlm.core.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_loads(path: Path) -> None:
    plan = plan_of(path, [])
    assert len(build_all(plan, path.name)) == len(plan) > 0


def test_recipes_is_a_folder_of_yaml_only() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    assert RECIPES and [p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".yaml"] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stage: data\nout: x\nsorce: factbook\n", "did you mean 'source'?"),
        ("stages:\n- stage: data\n- stage: tokenizer\n  data: data\n  vocab_size: many\n", "vocab_size"),
        ("stages:\n- stage: data\n  seed: -1\n", "seed"),
        ("stages:\n- stage: tokenizer\n  data: data\n", "no stage runs before"),
    ],
)
def test_a_planted_mistake_is_found(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        build_all(plan_of(path, []), path.name)
