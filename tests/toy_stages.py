"""Two stages that take no time: `write_text` writes a text, `double` reads one and writes it twice."""

from __future__ import annotations

from microlm.core.artifact import Workspace, stage
from microlm.core.errors import CheckFailed
from microlm.core.recipe import Field, Recipe, StageRecipe, artifact_input, unkeyed

CALLS: list[str] = []


class Inner(Recipe):
    """A block."""

    rate: float = Field(default=0.1, ge=0, description="rate")
    log_every: int = unkeyed(10, description="lines")


class TextRecipe(StageRecipe):
    """Writes `text`."""

    text: str = Field(default="hello", description="what to write")
    inner: Inner = Field(default=Inner(), description="a block")
    fail: str = unkeyed("", description="stop in this way")


class DoubleRecipe(StageRecipe):
    """Writes its input twice."""

    source: str = artifact_input(description="artifact to read")


@stage("text", "data", version=1)
def write_text(recipe: TextRecipe, work: Workspace) -> None:
    """Write the text, with a log beside it."""
    CALLS.append(recipe.out)
    before = work.resume / "progress"
    work.metrics["resumed"] = before.exists()
    before.write_text("half")
    work.write_text("documents/a.txt", recipe.text)
    (work.logs / "times.txt").write_text(str(len(CALLS)))
    work.licences.add("CC0-1.0")
    if recipe.fail == "interrupt":
        raise KeyboardInterrupt
    if recipe.fail == "check":
        raise CheckFailed("the text is not good enough")
    if recipe.fail == "crash":
        raise ZeroDivisionError("a bug")
    if recipe.fail:
        raise OSError(int(recipe.fail), "injected")


@stage("double", "model", version=1)
def double(recipe: DoubleRecipe, work: Workspace) -> None:
    """Write the input's text twice."""
    CALLS.append(recipe.out)
    work.write_text("twice.txt", work.inputs["source"].file("documents/a.txt").read_text() * 2)
