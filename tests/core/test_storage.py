"""Local and remote places by the same functions; `memory://` stands for an object store."""

import json
from pathlib import Path

import fsspec
import pytest
from toy_stages import DoubleRecipe, TextRecipe, double, write_text

from microlm.core import artifact, manifest, storage
from microlm.core.errors import UserError


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MICROLM_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)
    return "memory://bucket"


def test_remote_round_trip_equals_local(bucket: str, tmp_path: Path) -> None:
    remote = write_text(TextRecipe(out=f"{bucket}/run/a"))
    local = write_text(TextRecipe(out=str(tmp_path / "a")))
    assert (remote.key, remote.digest) == (local.key, local.digest)
    assert remote.file("documents/a.txt").read_bytes() == local.file("documents/a.txt").read_bytes()
    assert not manifest.damages(remote)
    assert storage.list_names(f"{bucket}/run/a") == ["documents", "logs", "manifest.json"]
    again = write_text(TextRecipe(out=f"{bucket}/run/a"))
    assert again.manifest == remote.manifest
    child = double(DoubleRecipe(source=f"{bucket}/run/a", out=f"{bucket}/run/b"))
    assert child.file("twice.txt").read_text() == "hellohello"
    assert child.manifest["inputs"]["source"]["path"] == f"{bucket}/run/a"
    assert not list((tmp_path / "cache/work").iterdir())


def test_a_local_input_of_a_remote_artifact_is_named_in_full(bucket: str, tmp_path: Path) -> None:
    write_text(TextRecipe(out=str(tmp_path / "a")))
    child = double(DoubleRecipe(source=str(tmp_path / "a"), out=f"{bucket}/b"))
    assert child.manifest["inputs"]["source"]["path"] == str(tmp_path / "a")


def test_remote_replacement_leaves_no_old_file(bucket: str) -> None:
    write_text(TextRecipe(out=f"{bucket}/a"))
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/a/stale.bin", b"x")
    made = write_text(TextRecipe(out=f"{bucket}/a", text="new"))
    assert made.file("documents/a.txt").read_text() == "new"
    assert not fs.exists("/bucket/a/stale.bin")


def test_a_place_that_is_no_artifact_is_not_overwritten(bucket: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/photos/cat.jpg", b"x")
    for place in (f"{bucket}/photos", bucket):
        with pytest.raises(UserError, match="in the way"):
            write_text(TextRecipe(out=place))
    assert fs.exists("/bucket/photos/cat.jpg")


def test_a_broken_upload_does_not_exist_and_is_finished_by_the_next_run(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    real, calls = type(fs).put_file, []

    def put(self: object, a: str, b: str, **k: object) -> None:
        calls.append(b)
        if len(calls) == 2:
            raise ZeroDivisionError
        real(self, a, b, **k)

    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "put_file", put)
        with pytest.raises(ZeroDivisionError):
            write_text(TextRecipe(out=f"{bucket}/a"))
    assert manifest.find(f"{bucket}/a") is None
    with pytest.raises(UserError, match="no finished artifact"):
        manifest.open_artifact(f"{bucket}/a")
    assert not manifest.damages(write_text(TextRecipe(out=f"{bucket}/a")))


def test_names_and_places() -> None:
    assert storage.join("s3://b/x/", "y", "z") == "s3://b/x/y/z"
    assert storage.join("runs", "y") == "runs/y"
    assert storage.parent("s3://b/x/y/") == "s3://b/x"
    assert storage.parent("runs/y") == "runs"
    assert storage.local_path("file:///a/b") == Path("/a/b")
    assert storage.is_remote("s3://b") and not storage.is_remote("file:///a")
    assert artifact.temporary("/r/a").name == "a.tmp"
    assert artifact.lock_path("/r/a.b").name == ".a.b.lock"
    with pytest.raises(UserError, match="cannot be an artifact's place"):
        artifact.temporary("/")


def test_write_atomic_leaves_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.json"
    storage.write_atomic(path, b"old")

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(UserError, match="disk is full"):
        storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_remove_and_list(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_text(json.dumps(1))
    assert storage.list_names(str(tmp_path)) == ["d"] and storage.list_names(str(tmp_path / "no")) == []
    storage.remove(str(tmp_path / "d/f"))
    storage.remove(str(tmp_path / "d"))
    assert storage.list_names(str(tmp_path)) == []
