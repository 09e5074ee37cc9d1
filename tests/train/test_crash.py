"""Crash, torn write, power cut, full disk, broken disk at every operation of a save: the last one loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from faults import ERRORS, Crash, Disk, Fault
from training import states, tiny_trained

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.model import directory
from microlm.train.checkpoint import Position, SavePlan, Saver, Trained, publish_best, restore
from microlm.train.checkpoint import trained as tensors

MODULES = (directory, tensors)
LAST, NEXT = 3, 4


def saver(folder: Path, trained: Trained) -> Saver:
    return Saver(trained, SavePlan(folder, 2, True, directory.save, {"stage": "tiny 1"}))


def position(step: int) -> Position:
    """Every step is better than the one before, so that the best weights are written anew too."""
    return Position(step, history=[{"step": float(step), "validation_loss": 9.0 - step}])


@pytest.fixture(scope="module")
def made() -> dict[int, Trained]:
    return {step: tiny_trained(step, steps=1) for step in (2, LAST, NEXT)}


@pytest.fixture(scope="module")
def before(made: dict[int, Trained], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints and the best weights."""
    folder = tmp_path_factory.mktemp("before") / "resume"
    for step in (2, LAST):
        with saver(folder, made[step]) as writing:
            writing.save(position(step))
    return folder


def save_next(folder: Path, trained: Trained) -> None:
    """What one save does, in this thread, so that its end is seen here."""
    writing = saver(folder, trained)
    with writing:
        writing.save(position(NEXT))
        writing.wait()


def assert_whole(folder: Path, made: dict[int, Trained]) -> int:
    """A checkpoint loads, its every byte that of its step; so do the best weights."""
    fresh = tiny_trained(9)
    at = restore(folder, fresh, {"stage": "tiny 1"})
    assert at is not None
    expected, found = states(made[at.step]), states(fresh)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert publish_best(folder, folder.parent / "best")
    best = directory.load(folder.parent / "best")
    weights = [{n: p.detach() for n, p in made[s].parameters.items()} for s in (LAST, NEXT)]
    assert any(all(torch.equal(p, w[n]) for n, p in best.named_parameters()) for w in weights)
    return at.step


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", ["crash", "torn", "power cut", "full", "broken"])
def test_whatever_fails_in_a_save_the_last_checkpoint_loads(
    tmp_path: Path, before: Path, made: dict[int, Trained], fault: Fault
) -> None:
    steps: list[int] = []
    disk = Disk(tmp_path, 0, fault)
    while not steps or disk.at <= len(disk.done):
        folder = shutil.copytree(before, tmp_path / str(len(steps)) / "resume")
        disk = Disk(tmp_path, len(steps) + 1, fault)
        with pytest.MonkeyPatch.context() as patch:
            disk.install(patch, MODULES)
            try:
                save_next(folder, made[NEXT])
            except Crash:
                assert fault not in ERRORS
            except UserError as e:
                assert fault in ERRORS
                assert ("disk is full" if fault == "full" else "input/output error") in str(e)
        if disk.at <= len(disk.done):
            steps.append(assert_whole(folder, made))
            save_next(folder, made[NEXT])
            assert assert_whole(folder, made) == NEXT
            assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == [
                "best-00000004", "step-00000003", "step-00000004",
            ]  # fmt: skip
    assert len(steps) >= 40
    assert {LAST, NEXT} == set(steps)
    visible = disk.done.index("rename step-00000004.part")
    durable = visible + disk.done[visible:].index("sync resume")
    assert set(steps[:visible]) == {LAST}
    assert set(steps[durable + 1 :]) == {NEXT}


def test_every_kind_of_operation_is_met(tmp_path: Path, before: Path, made: dict[int, Trained]) -> None:
    folder = shutil.copytree(before, tmp_path / "resume")
    disk = Disk(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch, MODULES)
        save_next(folder, made[NEXT])
    assert {what.split()[0] for what in disk.done} == {
        "mkdir", "open", "write", "save", "sync", "rename", "replace", "rmtree", "unlink",
    }  # fmt: skip
    synced = {what.split()[1] for what in disk.done if what.startswith("sync")}
    assert {"model.safetensors", "state-00001-of-00001.safetensors", "config.json", "resume"} <= synced
    written = disk.done[disk.done.index("rename best-00000004.part") :]
    assert written.index("sync state-00001-of-00001.safetensors") < written.index("open checkpoint.json.part")


def test_a_power_cut_would_be_seen(tmp_path: Path) -> None:
    """The faults bite: what is written without a sync and renamed is lost."""
    disk = Disk(tmp_path, 5, "power cut")
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch, ())
        with (tmp_path / "a.part").open("wb") as f:
            f.write(b"all")
        (tmp_path / "a.part").rename(tmp_path / "a")
        storage.sync_folder(tmp_path)
        with pytest.raises(Crash):
            (tmp_path / "b").open("wb")
    assert (tmp_path / "a").read_bytes() == b""
