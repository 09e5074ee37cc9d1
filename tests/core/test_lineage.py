"""The family tree, and every kind of damage to it."""

import shutil
from pathlib import Path

import pytest
from toy_stages import DoubleRecipe, TextRecipe, double, write_text

from microlm.core import lineage
from microlm.core.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    write_text(TextRecipe(out=str(root / "data")))
    double(DoubleRecipe(source=str(root / "data"), out=str(root / "left")))
    double(DoubleRecipe(source=str(root / "data"), out=str(root / "right"), seed=1))
    (root / "half.tmp").mkdir()
    return root


def test_tree_of_one_artifact(run: Path) -> None:
    node = lineage.tree(str(run / "left"))
    assert (node.name, node.kind, [c.name for c in node.inputs.values()]) == ("left", "model", ["data"])
    assert lineage.is_intact([node]) and lineage.check(str(run / "left")) == []
    with pytest.raises(UserError, match="no finished artifact"):
        lineage.tree(str(run / "no"))


def test_forest_shows_each_artifact_once(run: Path) -> None:
    nodes = lineage.forest(str(run))
    assert [n.name for n in nodes] == ["left", "right"]
    text = lineage.render(nodes)
    assert text.count("source: data") == 2 and "DAMAGED" not in text and "half" not in text
    told = lineage.to_json(nodes)
    assert told["schema"] == 1 and told["ok"] and [a["name"] for a in told["artifacts"]].count("data") == 1


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("data/documents/a.txt", lambda p: p.write_bytes(b"jello"), "documents/a.txt: changed"),
        ("left/twice.txt", lambda p: p.unlink(), "twice.txt: missing"),
        ("right/more.bin", lambda p: p.write_bytes(b""), "more.bin: extra"),
        ("data/manifest.json", lambda p: p.write_text("{"), "not valid JSON"),
    ],
)
def test_damage_is_found_and_named(run: Path, file: str, damage, told: str) -> None:  # type: ignore[no-untyped-def]
    damage(run / file)
    nodes = lineage.forest(str(run))
    assert not lineage.is_intact(nodes)
    assert told in lineage.render(nodes)
    bad = [a for a in lineage.to_json(nodes)["artifacts"] if not a["ok"]]
    assert [a["name"] for a in bad] == [file.split("/")[0]]


def test_without_verify_no_file_is_hashed(run: Path) -> None:
    (run / "left/twice.txt").write_text("x")
    assert lineage.is_intact([lineage.tree(str(run / "left"), verify=False)])


def test_an_input_that_was_made_again_is_told(run: Path) -> None:
    write_text(TextRecipe(out=str(run / "data"), text="other"))
    node = lineage.tree(str(run / "left"))
    assert "input source (data) was" in node.problems[0] and "is now" in node.problems[0]


def test_an_input_that_is_gone_is_no_damage(run: Path) -> None:
    shutil.rmtree(run / "data")
    node = lineage.tree(str(run / "left"))
    assert node.notes and "is gone" in lineage.render([node]) and lineage.is_intact([node])


def test_a_moved_run_keeps_its_tree(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "else/where"
    moved.parent.mkdir()
    run.rename(moved)
    nodes = lineage.forest(str(moved))
    assert lineage.is_intact(nodes) and all(n.inputs and not n.notes for n in nodes)
    (tmp_path / "link").symlink_to(moved)
    assert lineage.forest(str(tmp_path / "link"))[0].inputs


def test_a_cycle_of_forged_manifests_ends(run: Path) -> None:
    path = run / "data/manifest.json"
    text = path.read_text().replace(
        '"inputs": {}', '"inputs": {"x": {"path": "left", "key": "k", "digest": "d"}}'
    )
    path.write_text(text)
    nodes = lineage.forest(str(run))
    assert "(see above)" in lineage.render(nodes) and not lineage.is_intact(nodes)


def test_an_empty_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no artifact there or below"):
        lineage.forest(str(tmp_path))
