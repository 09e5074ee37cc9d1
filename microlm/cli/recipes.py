"""A recipe's word → its file. Enters: a path, or the bare name of a recipe that comes with MicroLM."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def find_recipe(word: str | Path) -> Path:
    """A path as it is; for a bare name such as `quickstart` the recipe that comes with MicroLM.

    What names nothing is returned unchanged: reading it says what is wrong.
    """
    path = Path(word)
    is_name = path.name == str(word) and not path.suffix
    if is_name and not path.is_file() and (own := _folder() / f"{word}.yaml").is_file():
        return own
    return path


def recipe_names() -> list[str]:
    """The bare names that `find_recipe` knows."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    """In a checkout `recipes/` stands beside the package; a wheel carries it inside."""
    checkout = PACKAGE.parent / "recipes"
    return checkout if (PACKAGE.parent / "pyproject.toml").is_file() else PACKAGE / "recipes"
