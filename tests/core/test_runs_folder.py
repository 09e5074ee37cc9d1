"""Listing, removing with respect for lineage, sweeping up."""

from pathlib import Path

import pytest
from toy_stages import DoubleRecipe, TextRecipe, double, write_text

from microlm.core import artifact, runs, storage
from microlm.core.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    write_text(TextRecipe(out=str(root / "one/data")))
    double(DoubleRecipe(source=str(root / "one/data"), out=str(root / "one/model")))
    double(DoubleRecipe(source=str(root / "one/data"), out=str(root / "two/model")))
    with pytest.raises(ZeroDivisionError):
        write_text(TextRecipe(out=str(root / "two/data"), fail="crash"))
    return root


def test_list(root: Path) -> None:
    (root / "two/model/manifest.json").write_text("{")
    found = {r.name: (r.kind, r.state) for r in runs.list_runs(root)}
    assert found == {
        "one/data": ("data", "finished"),
        "one/model": ("model", "finished"),
        "two/data": ("?", "unfinished"),
        "two/model": ("?", "damaged"),
    }
    with storage.locked(artifact.lock_path(str(root / "two/data")), "busy"):
        assert "running" in [r.state for r in runs.list_runs(root)]
    with pytest.raises(UserError, match="no such directory"):
        runs.list_runs(root / "no")


def test_the_time_of_a_resumed_stage_is_not_known(root: Path) -> None:
    write_text(TextRecipe(out=str(root / "two/data")))  # its first attempt was cut off
    seconds = {r.name: r.seconds for r in runs.list_runs(root)}
    assert seconds["two/data"] is None
    assert seconds["one/data"] == artifact.open_artifact(str(root / "one/data")).manifest["times"]["seconds"]


def test_remove_respects_lineage(root: Path) -> None:
    with pytest.raises(UserError, match=r"one/data: '.*/one/model' was made from it"):
        runs.remove("one/data", root)
    with pytest.raises(UserError, match=r"'.*/two/model' was made from it"):
        runs.remove("one", root)
    assert [p.name for p in runs.remove("two/model", root)] == ["model"]
    assert [p.name for p in runs.remove("one", root)] == ["data", "model"]
    assert not (root / "one").exists()


def test_remove_with_force(root: Path) -> None:
    runs.remove("one/data", root, force=True)
    assert not (root / "one/data").exists() and (root / "one/model").exists()


@pytest.mark.parametrize("name", [".", "..", "", "no/such"])
def test_remove_refuses_everything_and_nothing(root: Path, name: str) -> None:
    with pytest.raises(UserError):
        runs.remove(name, root)
    assert (root / "one/data").exists()


def test_remove_refuses_what_is_being_made_and_what_is_no_artifact(root: Path) -> None:
    with (
        storage.locked(artifact.lock_path(str(root / "two/model")), "busy"),
        pytest.raises(UserError, match="being made"),
    ):
        runs.remove("two/model", root)
    (root / "notes").mkdir()
    (root / "notes/mine.txt").write_text("x")
    with pytest.raises(UserError, match="no finished artifact"):
        runs.remove("notes", root)


def test_gc_takes_leftovers_that_nobody_holds(root: Path) -> None:
    (root / "one/.data.old").mkdir()
    (root / "one/.data.old/x").write_bytes(b"12345")
    (root / "one/.data.old/manifest.json").touch()
    (root / "one/.yours.old").mkdir()  # named alike, but no artifact of ours
    (root / "one/yours.tmp").mkdir()
    (root / "one/yours.tmp/x").write_bytes(b"1")
    (root / "one/.gone.lock").write_text("")
    (root / "one/keep.old").mkdir()
    (root / "one/model/inner.tmp").mkdir()
    with storage.locked(artifact.lock_path(str(root / "one/busy")), "busy"):
        (root / "one/busy.tmp").mkdir()
        found = {i.path.relative_to(root).as_posix(): i.bytes for i in runs.leftovers(root)}
        assert set(found) == {"one/.data.old", "one/.gone.lock", "two/data.tmp"}
        assert found["one/.data.old"] == 5 and found["two/data.tmp"] > 0
        assert len(runs.collect(root)) == 3
        assert runs.leftovers(root) == [] and (root / "one/busy.tmp").exists()
    assert (root / "one/keep.old").exists() and (root / "one/model/inner.tmp").exists()
    assert (root / "one/data").exists()


@pytest.mark.parametrize("same", [True, False])
def test_the_reports_copy_goes_with_it(tmp_path: Path, same: bool) -> None:
    made = write_text(TextRecipe(out=str(tmp_path / "quick/report")))
    (made.path / "logs/report.html").write_text("page")
    copy = tmp_path / "quick/report.html"
    copy.write_text("page" if same else "mine")
    runs.remove("quick/report", tmp_path)
    assert copy.exists() is not same
