"""Key, digest, skip, resume, recovery, replacement, locks, and refusals of the disk."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import toy_stages
from artifacts import sign
from toy_stages import DoubleRecipe, Inner, TextRecipe, double, write_text

from microlm.core import artifact, manifest, storage
from microlm.core.errors import UserError


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    toy_stages.CALLS.clear()


def make(path: Path, **fields: object) -> artifact.Artifact:
    return write_text(TextRecipe(out=str(path), **fields))  # type: ignore[arg-type]


def test_key_ignores_place_parallel_and_unkeyed_fields(tmp_path: Path) -> None:
    plain = make(tmp_path / "a")
    other = make(tmp_path / "b", parallel={"processes": 7}, inner=Inner(log_every=3))
    assert plain.key == other.key
    assert make(tmp_path / "c", seed=1).key != plain.key
    assert make(tmp_path / "d", text="x").key != plain.key
    assert make(tmp_path / "e", inner=Inner(rate=0.2)).key != plain.key


def test_key_holds_the_input_keys_not_their_paths(tmp_path: Path) -> None:
    make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", text="other")
    keys = [double(DoubleRecipe(source=str(tmp_path / s), out=str(tmp_path / f"out-{s}"))).key for s in "abc"]
    assert keys[0] == keys[1] != keys[2]


def test_digest_is_of_the_payload_only(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", parallel={"processes": 3})
    assert a.file("logs/times.txt").read_text() != b.file("logs/times.txt").read_text()
    assert a.digest == b.digest
    assert make(tmp_path / "c", text="x").digest != a.digest


def test_same_key_is_skipped_and_another_key_replaces(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    assert make(tmp_path / "a").manifest == first.manifest
    assert len(toy_stages.CALLS) == 1
    second = make(tmp_path / "a", text="new")
    assert len(toy_stages.CALLS) == 2
    assert second.file("documents/a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_manifest_says_what_was_made(tmp_path: Path) -> None:
    made = make(tmp_path / "a", seed=5)
    told = made.manifest
    assert (told["format"], told["kind"], told["stage"], told["seed"]) == (1, "data", "text", 5)
    assert told["licences"] == ["CC0-1.0"] and told["metrics"] == {"resumed": False}
    assert {f["path"]: f["payload"] for f in told["files"]} == {
        "documents/a.txt": True,
        "logs/times.txt": False,
    }
    assert told["recipe"]["text"] == "hello" and told["environment"]["python"]
    assert not manifest.damages(made)
    child = double(DoubleRecipe(source=str(tmp_path / "a"), out=str(tmp_path / "b")))
    assert child.manifest["inputs"]["source"] == {"path": "a", "key": made.key, "digest": made.digest}
    assert child.manifest["licences"] == ["CC0-1.0"]


def test_resume_survives_for_the_same_key_only(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "a", fail="crash")
    assert (tmp_path / "a.tmp/resume/progress").exists() and not (tmp_path / "a").exists()
    resumed = make(tmp_path / "a").manifest
    assert resumed["metrics"]["resumed"] is resumed["times"]["resumed"] is True
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "b", fail="crash")
    other = make(tmp_path / "b", text="other").manifest
    assert other["metrics"]["resumed"] is other["times"]["resumed"] is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_failed_remake_leaves_the_old_artifact(tmp_path: Path) -> None:
    old = make(tmp_path / "a")
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "a", text="new", fail="crash")
    assert manifest.open_artifact(str(tmp_path / "a")).digest == old.digest
    assert not manifest.damages(old)


def test_crash_between_sign_and_rename_needs_only_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "_finish", lambda out, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(tmp_path / "a")
    assert not (tmp_path / "a").exists() and (tmp_path / "a.tmp/manifest.json").exists()
    made = make(tmp_path / "a")
    assert len(toy_stages.CALLS) == 1 and not manifest.damages(made)
    assert not (tmp_path / "a/resume").exists()


def test_signed_folder_of_another_key_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "_finish", lambda out, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(tmp_path / "a")
    assert make(tmp_path / "a", text="new").file("documents/a.txt").read_text() == "new"


def test_crash_while_signing_keeps_the_resume_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", _only_for("manifest.json", storage.write_atomic))
        with pytest.raises(ZeroDivisionError):
            make(tmp_path / "a")
    assert make(tmp_path / "a").manifest["metrics"]["resumed"] is True


def _only_for(name: str, real):  # type: ignore[no-untyped-def]
    def write(path: Path, data: bytes) -> None:
        if path.name == name:
            raise ZeroDivisionError
        real(path, data)

    return write


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("where", ["fsync", "replace", "rename", "body", "write_text", "write"])
def test_refusals_of_the_disk_leave_the_old_artifact_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, replacing: bool, where: str
) -> None:
    old = make(tmp_path / "a", text="old") if replacing else None

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"disk|read-only"):
        if where == "fsync":
            patch.setattr(os, "fsync", refuse)
        elif where == "rename":
            real = Path.rename

            def rename(self: Path, target: Path) -> Path:
                return refuse() if self.suffix == ".tmp" else real(self, target)  # type: ignore[return-value]

            patch.setattr(Path, "rename", rename)
        elif where == "write":
            patch.setattr(Path, "open", _open_full(refuse))
        elif where != "body":
            patch.setattr(Path, where, refuse)
        make(tmp_path / "a", text="new", fail=str(code) if where == "body" else "")
    found = manifest.find(str(tmp_path / "a"))
    if old is None:
        assert found is None
    else:
        assert found is not None and found.digest == old.digest and not manifest.damages(found)
    assert make(tmp_path / "a", text="new").file("documents/a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def _open_full(refuse):  # type: ignore[no-untyped-def]
    """`Path.open` whose files take no byte."""
    real = Path.open

    def opened(self: Path, mode: str = "r", *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        file = real(self, mode, *args, **kwargs)  # type: ignore[call-overload]
        if "w" not in mode:
            return file
        full = MagicMock(wraps=file)
        full.__enter__.return_value = full
        full.write.side_effect = refuse
        return full

    return opened


def test_rust_libraries_refusals_are_explained() -> None:
    with pytest.raises(UserError, match="disk is full"), storage.explain_write("x"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError), storage.explain_write("x"):
        raise RuntimeError("(os error 999)")


def test_what_is_no_artifact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/mine.txt").write_text("mine")
    (tmp_path / "f").write_text("a file")
    for name in ("a", "f"):
        with pytest.raises(UserError, match="in the way"):
            make(tmp_path / name)
    assert (tmp_path / "a/mine.txt").exists() and toy_stages.CALLS == []
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty").digest
    with pytest.raises(UserError, match="a file stands"):
        make(tmp_path / "f" / "inner")


def test_a_users_own_old_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.old").mkdir()
    make(tmp_path / "a"), make(tmp_path / "a", text="new")
    assert (tmp_path / "a.old").exists()


def test_a_second_process_is_told(tmp_path: Path) -> None:
    lock = artifact.lock_path(str(tmp_path / "a"))
    lock.parent.mkdir(exist_ok=True)
    code = (
        "import sys,pathlib;from microlm.core import storage\n"
        "with storage.locked(pathlib.Path(sys.argv[1]), 'busy'):\n"
        " print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline()
        assert storage.is_locked(lock)
        with pytest.raises(UserError, match="another process is making"):
            make(tmp_path / "a")
        holder.kill()  # a killed holder leaves its file, which no longer counts
    assert lock.exists() and not storage.is_locked(lock)
    assert make(tmp_path / "a").digest and not lock.exists()


def test_the_lock_is_taken_on_the_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with storage.locked(path, "busy"):
        with pytest.raises(UserError, match="busy"), storage.locked(path, "busy"):
            pass
        assert path.exists()
        path.unlink()
        with storage.locked(path, "busy"):
            assert storage.is_locked(path)


def test_a_damaged_input_is_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a/documents/a.txt").write_text("hellO")
    with pytest.raises(UserError, match=r"documents/a\.txt: changed"):
        double(DoubleRecipe(source=str(tmp_path / "a"), out=str(tmp_path / "b")))


def test_a_cut_off_or_missing_file_is_made_again(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a/documents/a.txt").write_text("hel")
    assert make(tmp_path / "a").file("documents/a.txt").read_text() == "hello"
    (tmp_path / "a/documents/a.txt").unlink()
    assert make(tmp_path / "a").file("documents/a.txt").read_text() == "hello"


def test_damages_names_what_happened(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    (tmp_path / "a/documents/a.txt").unlink()
    (tmp_path / "a/logs/times.txt").write_text("9")
    (tmp_path / "a/new.bin").write_bytes(b"")
    assert manifest.damages(made) == {
        "documents/a.txt": "missing",
        "logs/times.txt": "changed",
        "new.bin": "extra",
    }


def test_a_manifest_that_was_edited_to_fit_is_found(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    (tmp_path / "a/documents/a.txt").write_text("hellO")
    told = json.loads((tmp_path / "a/manifest.json").read_text())
    told["files"][0]["sha256"] = manifest.hash_file(tmp_path / "a/documents/a.txt")
    (tmp_path / "a/manifest.json").write_text(json.dumps(told))
    assert manifest.damages(manifest.open_artifact(made.url)) == {"manifest.json": "changed"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON"),
        ("[1]", "format None"),
        ('{"format": 2}', "format 2"),
        ('{"format": 1}', "missing or of the wrong type"),
        (
            '{"format":1,"kind":"data","key":"","digest":"","inputs":{},"files":[{"path":"../x"}]}',
            "wrong type",
        ),
        ('{"format":1,"kind":"data","key":"","digest":"","inputs":{"a":1},"files":[]}', "wrong type"),
        ("[" * 100_000, "not valid JSON"),
        ("\ud800", "not valid JSON"),
    ],
)
def test_broken_manifests_are_sentences(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=told):
        manifest.open_artifact(str(tmp_path))


def test_an_unfinished_artifact_is_said_to_be_unfinished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check the path"):
        manifest.open_artifact(str(tmp_path / "a"))
    (tmp_path / "a.tmp").mkdir()
    with pytest.raises(UserError, match="has not finished"):
        manifest.open_artifact(str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"holds no 'x\.json'"):
        make(tmp_path / "b").json("x.json")


@pytest.mark.slow
def test_kill_9_at_any_moment_and_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """The body kills its own process once, half-way; the next run finishes."""
    code = (
        "import os,sys; sys.path.insert(0, 'tests'); import toy_stages as t\n"
        "from pathlib import Path\n"
        "real = Path.write_text\n"
        "def write(self, *a, **k):\n"
        "    n = real(self, *a, **k)\n"
        "    if self.name == sys.argv[2]: os.kill(os.getpid(), 9)\n"
        "    return n\n"
        "Path.write_text = write\n"
        "t.write_text(t.TextRecipe(out=sys.argv[1]))"
    )
    for at in ("progress", "a.txt", "times.txt"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a"), at], check=False)
        assert done.returncode == -9 and manifest.find(str(tmp_path / "a")) is None
    assert make(tmp_path / "a").digest == make(tmp_path / "b").digest


def test_a_checkpoint_is_found_from_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = tmp_path / "sft" / "best" / manifest.CHECKPOINT
    sign(tmp_path / "sft", "model", lambda work: work.write_json("best/checkpoint.json", {"step": 3}))
    for folder, url in ((tmp_path, "sft/best"), (tmp_path / "sft", "best"), (head.parent, ".")):
        monkeypatch.chdir(folder)
        found = manifest.open_artifact(url)
        assert found.which["checkpoint"]["step"] == 3 and found.file(manifest.CHECKPOINT).samefile(head)
    for text in ("[]", "{"):
        head.write_text(text)
        with pytest.raises(UserError, match=r"checkpoint\.json: is missing or damaged; remove"):
            manifest.open_artifact(".")
    head.unlink()
    with pytest.raises(UserError, match="is missing or damaged"):
        manifest.open_artifact(".")
