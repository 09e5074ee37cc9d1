"""Rank 0's writer of checkpoints: a snapshot at once, the writing in a thread beside the training."""

from __future__ import annotations

import math
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.core import storage
from microlm.core.artifact import JUDGED
from microlm.train.checkpoint import folder as folders
from microlm.train.checkpoint.position import Position
from microlm.train.checkpoint.restore import checkpoints, step_of
from microlm.train.checkpoint.trained import SaveWeights, Snapshot, Trained

_HINT = "free some space, lower loop.keep, or choose another place with output=DIR"


@dataclass(frozen=True)
class SavePlan:
    """Where checkpoints go, how many stay, how weights are written, what the run was made for."""

    folder: Path
    keep: int
    keep_best: bool
    save_weights: SaveWeights
    fingerprint: Mapping[str, Any]


class Saver:
    """`with Saver(trained, plan) as saver: saver.check(); saver.save(at)`; `active` on rank 0 alone.

    `saved` is the step of a checkpoint that lies there already. A save waits for the one before. What goes
    wrong in the thread is raised by the next `check`, `save` or `wait`.
    """

    def __init__(
        self, trained: Trained, plan: SavePlan, active: bool = True, saved: int | None = None
    ) -> None:
        self.trained, self.plan, self.active = trained, plan, active
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._snapshot: Snapshot | None = None
        self._best = math.inf
        self._saved = saved

    def __enter__(self) -> Saver:
        if self.active:
            folder = self.plan.folder
            with storage.explain_write(folder):
                folder.mkdir(parents=True, exist_ok=True)
                folders.sweep(folder)
            if self._saved is not None:  # a crash may have come between a save and this
                self._discard_older("step", self._saved)
            for _, place in _bests(folder)[1:]:
                folders.discard(place)
            self._best = next((loss for loss, _ in _bests(folder)), math.inf)
            kept = len(checkpoints(folder))
            new = max(1, self.plan.keep + 1 - kept)
            extra = 2 * self.trained.weight_bytes if self.plan.keep_best else 0
            needed = new * self.trained.most_bytes + extra + self.trained.weight_bytes
            storage.require_space(folder, needed, f"training ({new} more checkpoints)", _HINT)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Let the last save end; a Ctrl-C does not wait for it (its folder is whole or not there)."""
        if kind is not None and not issubclass(kind, Exception):
            return
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None and kind is None:
            warnings.warn(f"the last checkpoint was not written: {self._failure}", stacklevel=2)

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def save(self, at: Position, due: bool = True) -> None:
        """Write a checkpoint of now if it is `due`, and the weights if no validation was better than this."""
        loss = at.validation_loss
        best = self.plan.keep_best and loss is not None and loss < self._best
        due = due and at.step != self._saved
        if not self.active or not (due or best):
            return
        self.wait()
        storage.require_space(self.plan.folder, self.trained.most_bytes, "a checkpoint", _HINT)
        self._snapshot = self._snapshot or Snapshot(self.trained)
        self._snapshot.take()
        heads: dict[str, dict[str, Any]] = {}
        if best and loss is not None:
            heads["best"] = {"step": at.step, "validation_loss": loss}
            self._best = loss
        if due:
            fingerprint = dict(self.plan.fingerprint)
            heads["step"] = {"step": at.step, "position": at.to_json(), "fingerprint": fingerprint}
            self._saved = at.step
        self._thread = threading.Thread(
            target=self._run, args=(self._snapshot, heads), name="checkpoint", daemon=True
        )
        self._thread.start()

    def forget(self) -> None:
        """The run went back: a checkpoint of a step that comes again is a new one."""
        self._saved = None

    def _run(self, snapshot: Snapshot, heads: Mapping[str, Mapping[str, Any]]) -> None:
        try:
            for kind, head in heads.items():
                self._write(kind, snapshot, head)
        except Exception as e:
            self._failure = e

    def _write(self, kind: str, snapshot: Snapshot, head: Mapping[str, Any]) -> None:
        """One folder, then forget the older ones; those of later steps are of another try."""

        def fill(folder: Path) -> None:
            self.plan.save_weights(snapshot.decoder, folder)
            if kind == "step":
                snapshot.write_states(folder)

        parent, step = self.plan.folder, head["step"]
        folders.write(parent / f"{kind}-{step:08d}", fill, head)
        if not (parent / JUDGED).exists():
            storage.write_atomic(parent / JUDGED, b"by the fingerprints of the checkpoints\n")
        for place in checkpoints(parent, kind):
            if step_of(place) > step:
                folders.discard(place)
        self._discard_older(kind, step)

    def _discard_older(self, kind: str, step: int) -> None:
        """Of the folders up to a step the last ones stay: `keep` checkpoints, one with the best weights."""
        found = [p for p in checkpoints(self.plan.folder, kind) if step_of(p) <= step]
        for place in found[: -(self.plan.keep if kind == "step" else 1)]:
            folders.discard(place)


def publish_best(resume: Path, target: Path) -> bool:
    """Copy the weights of the best validation to `target`; False when there was none."""
    found = _bests(resume)
    if found:
        with storage.explain_write(target):
            shutil.copytree(found[0][1], target, dirs_exist_ok=True)
    return bool(found)


def _bests(folder: Path) -> list[tuple[float, Path]]:
    """The losses and intact folders of best weights, the best one first."""
    found = []
    for place in checkpoints(folder, "best"):
        try:
            found.append((float(folders.read(place)["validation_loss"]), place))
        except folders.Damaged as e:
            warnings.warn(f"{e}; left out", stacklevel=2)
    return sorted(found)
