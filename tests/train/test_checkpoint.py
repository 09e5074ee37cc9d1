"""Checkpoints: what is written comes back bit for bit; what is damaged is passed over by name."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import VOCAB, add_lora, make_job, states, tiny_decoder, tiny_loop, tiny_trained
from transformers import AutoModelForCausalLM

from microlm.core.errors import UserError
from microlm.model import directory, lora
from microlm.train.checkpoint import Position, SavePlan, Saver, Trained, restore
from microlm.train.checkpoint import folder as folders
from microlm.train.checkpoint import trained as tensors
from microlm.train.checkpoint.position import random_state, set_random_state
from microlm.train.job import LoopRecipe
from microlm.train.loop import train
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks

RANDOM = random_state()
MADE_FOR = {"stage": "tiny 1", "recipe": {"optim": {"matrix_lr": 0.02}}, "inputs": {"shards": "a"}}


def plan(folder: Path, **fields: Any) -> SavePlan:
    values: dict[str, Any] = {
        "folder": folder, "keep": 2, "keep_best": False, "save_weights": directory.save,
        "fingerprint": MADE_FOR,
    }  # fmt: skip
    return SavePlan(**(values | fields))


def write(folder: Path, steps: tuple[int, ...] = (1, 2, 3), **fields: Any) -> dict[int, Trained]:
    """Checkpoints of some steps, each with weights of its own."""
    made = {}
    for step in steps:
        made[step] = tiny_trained(step, steps=step)
        with Saver(made[step], plan(folder, **fields)) as saver:
            saver.save(position(step))
    return made


def position(step: int, **fields: Any) -> Position:
    rows = [{"step": float(i), "loss": 0.1} for i in range(step)]
    return Position(step, step * 10, rows, [0.25], {"places": [[0, step]]}, RANDOM, **fields)


def same(a: Trained, b: Trained) -> bool:
    left, right = states(a), states(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    made = write(tmp_path)
    fresh = tiny_trained(9)
    at = restore(tmp_path, fresh, MADE_FOR)
    assert at == position(3)
    assert same(fresh, made[3])


def test_an_adapter_comes_back(tmp_path: Path) -> None:
    save = partial(lora.save_adapter, base_name="base", base_digest="0")
    made = tiny_trained(1, steps=3, decoder=add_lora(tiny_decoder()))
    with Saver(made, plan(tmp_path, save_weights=save)) as saver:
        saver.save(position(3))
    fresh = tiny_trained(9, decoder=add_lora(tiny_decoder()))
    assert restore(tmp_path, fresh, MADE_FOR) == position(3)
    assert same(fresh, made)
    files = {p.name for p in (tmp_path / "step-00000003").iterdir()}
    assert files == {
        "adapter_config.json", "adapter_model.safetensors", "state-00001-of-00001.safetensors",
        "checkpoint.json",
    }  # fmt: skip


def test_shards_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "SHARD_BYTES", 20_000)
    made = write(tmp_path, (3,), save_weights=partial(directory.save, shard_bytes=20_000))
    files = [p.name for p in (tmp_path / "step-00000003").iterdir()]
    assert sum(name.startswith("state-") for name in files) > 2
    assert sum(name.startswith("model-") for name in files) > 2
    assert all((tmp_path / "step-00000003" / n).stat().st_size < 30_000 for n in files if "-of-" in n)
    fresh = tiny_trained(9)
    restore(tmp_path, fresh, MADE_FOR)
    assert same(fresh, made[3])


def test_a_checkpoint_is_a_model_for_transformers(tmp_path: Path) -> None:
    made = write(tmp_path, (3,))
    ids = torch.arange(20)[None] % VOCAB
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "step-00000003", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, made[3].decoder(ids), atol=1e-4)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept(tmp_path: Path, keep: int) -> None:
    write(tmp_path, (1, 2, 3, 4), keep=keep)
    assert names(tmp_path) == [f"step-0000000{s}" for s in (1, 2, 3, 4)][-keep:]


def test_what_a_crash_left_too_many_goes_at_the_next_start(tmp_path: Path) -> None:
    made = write(tmp_path, (1, 2, 3, 4), keep=4)
    with Saver(made[4], plan(tmp_path), saved=3):
        assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_those_of_later_steps_go_when_the_run_has_gone_back(tmp_path: Path) -> None:
    write(tmp_path, (4, 6))
    write(tmp_path, (5,))
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_without_a_checkpoint_nothing_moves(tmp_path: Path) -> None:
    fresh = tiny_trained(9)
    assert restore(tmp_path, fresh, MADE_FOR) is None
    assert same(fresh, tiny_trained(9))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


FILES = ("checkpoint.json", "config.json", "generation_config.json", "model.safetensors")


@pytest.mark.parametrize("file", [*FILES, "state-00001-of-00001.safetensors"])
def test_one_flipped_bit_in_any_file_is_named_and_passed_over(tmp_path: Path, file: str) -> None:
    made = write(tmp_path / "whole")
    size = (tmp_path / "whole/step-00000003" / file).stat().st_size
    rng = random.Random(file)
    for i, at in enumerate([0, size - 1, *(rng.randrange(size) for _ in range(6))]):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        flip(folder / "step-00000003" / file, at)
        fresh = tiny_trained(9)
        with pytest.warns(UserWarning, match=rf"step-00000003/{file}: .*; going on from step-00000002"):
            at_2 = restore(folder, fresh, MADE_FOR)
        assert at_2 is not None and at_2.step == 2
        assert same(fresh, made[2])


def test_a_bit_of_json_that_stays_json_is_seen(tmp_path: Path) -> None:
    write(tmp_path)
    index = tmp_path / "step-00000003/checkpoint.json"
    index.write_text(index.read_text().replace('"tokens": 30', '"tokens": 31'))
    with pytest.warns(UserWarning, match=r"checkpoint.json: changed since it was written"):
        assert restore(tmp_path, tiny_trained(9), MADE_FOR) == position(2)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:1000]),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no index": lambda f: (f / "checkpoint.json").unlink(),
    "an empty index": lambda f: (f / "checkpoint.json").write_text(""),
    "another index": lambda f: (f / "checkpoint.json").write_text(json.dumps([1])),
    "an index of nothing": lambda f: (f / "checkpoint.json").write_text("{}"),
    "of an older format": lambda f: (f / "checkpoint.json").write_text(json.dumps({"step": 3, "seal": "0"})),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, what: str) -> None:
    made = write(tmp_path)
    DAMAGE[what](tmp_path / "step-00000003")
    fresh = tiny_trained(9)
    with pytest.warns(UserWarning, match=r"step-00000003/.*; going on from step-00000002"):
        assert restore(tmp_path, fresh, MADE_FOR) == position(2)
    assert same(fresh, made[2])


def test_without_an_intact_one_the_files_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    flip(tmp_path / "step-00000003/model.safetensors", -5)
    (tmp_path / "step-00000002/config.json").unlink()
    with pytest.raises(UserError) as told:
        restore(tmp_path, tiny_trained(9), MADE_FOR)
    assert "step-00000003/model.safetensors: changed since it was written" in str(told.value)
    assert "step-00000002/config.json: cannot be read (No such file or directory)" in str(told.value)
    assert f"no intact checkpoint is left: remove {tmp_path} to start anew" in str(told.value)


OTHER = {"stage": "tiny 1", "recipe": {"optim": {"matrix_lr": 0.01}}, "inputs": {"shards": "a"}}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    made = write(tmp_path)
    fresh = tiny_trained(9)
    with pytest.raises(UserError, match=r"matrix_lr was 0.02, is 0.01.; .*loop.allow_mismatch=true"):
        restore(tmp_path, fresh, OTHER)
    assert same(fresh, tiny_trained(9))
    with pytest.warns(UserWarning, match=r"going on although settings differ .recipe.optim.matrix_lr was"):
        at = restore(tmp_path, fresh, OTHER, allow_mismatch=True)
    assert at == position(3, mismatches=["from step 3: recipe.optim.matrix_lr was 0.02, is 0.01"])
    assert same(fresh, made[3])


def test_the_place_in_other_data_means_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    other = MADE_FOR | {"inputs": {"shards": "b" * 64}}
    with pytest.warns(UserWarning, match=r"inputs.shards was a, is bbbbbbbbbbbb…"):
        at = restore(tmp_path, tiny_trained(9), other, allow_mismatch=True)
    assert at is not None and at.data == {}


def test_the_place_among_samples_cut_otherwise_means_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    other = MADE_FOR | {"recipe": {"optim": {"matrix_lr": 0.02}, "too_long": "split"}}
    with pytest.warns(UserWarning, match=r"recipe.too_long was None, is split"):
        at = restore(tmp_path, tiny_trained(9), other, allow_mismatch=True)
    assert at is not None and at.data == {}


def test_another_shape_is_refused_even_where_a_mismatch_is_allowed(tmp_path: Path) -> None:
    write(tmp_path)
    wide = tiny_trained(9, decoder=tiny_decoder(intermediate_size=96))
    words = r"'model.*mlp.*weight' is .*there and .* in this model; remove"
    with pytest.raises(UserError, match=words), pytest.warns(UserWarning, match="settings differ"):
        restore(tmp_path, wide, OTHER, allow_mismatch=True)


def test_another_optimizer_begins_anew(tmp_path: Path) -> None:
    """Where a mismatch is allowed, Muon's momentum is of no use to AdamW; the tables keep their moments."""
    made = write(tmp_path, (3,))[3]
    fresh = tiny_trained(9, rates=OptimRecipe(matrices="adamw"))
    restore(tmp_path, fresh, MADE_FOR)
    kept, found = made.states(), fresh.states()
    assert found and found.keys() < kept.keys()
    assert all(torch.equal(found[k], kept[k]) for k in found)
    for p in fresh.parameters.values():
        p.grad = torch.ones_like(p)
    fresh.step()
    assert all(bool(p.isfinite().all()) for p in fresh.parameters.values())


def test_every_random_state_comes_back() -> None:
    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            float(torch.rand(())),
        ]

    draw()  # leaves half a pair of normal numbers behind
    state = json.loads(json.dumps(random_state()))
    first = [draw() for _ in range(3)]
    set_random_state(state)
    assert [draw() for _ in range(3)] == first


def validated(step: int, loss: float) -> Position:
    return Position(step, history=[{"step": float(step), "validation_loss": loss}])


def test_what_chooses_the_best_weights_is_in_the_key() -> None:
    """Where none are kept, validation changes nothing that is left."""
    for more in ({"validation_steps": 7}, {"validation_rows": 7}):
        assert LoopRecipe().keyed() == LoopRecipe(**more).keyed()
        kept = LoopRecipe(keep_best=True)
        assert kept.keyed() != LoopRecipe(keep_best=True, **more).keyed()
    assert LoopRecipe().keyed().keys() < kept.keyed().keys()


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    losses = {1: 2.0, 2: 1.5, 3: 1.7}
    made = {}
    for step, loss in losses.items():
        made[step] = tiny_trained(step, steps=1)
        with Saver(made[step], plan(tmp_path, keep_best=True)) as saver:
            saver.save(validated(step, loss), due=step == 3)
    assert names(tmp_path) == ["best-00000002", "step-00000003"]
    best = directory.load(tmp_path / "best-00000002")
    for name, p in best.named_parameters():
        assert torch.equal(p, dict(made[2].decoder.named_parameters())[name])
    assert folders.read(tmp_path / "best-00000002")["validation_loss"] == 1.5


def test_a_disk_without_room_is_a_sentence_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [10_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, room[0]))
    made = tiny_trained(1, steps=1)
    with pytest.raises(UserError, match=r"training .3 more checkpoints. needs \d MB, 0 MB are free; .*keep"):
        Saver(made, plan(tmp_path)).__enter__()
    room[0] = 10_000_000
    with Saver(made, plan(tmp_path)) as saver:
        room[0] = 10_000
        with pytest.raises(UserError, match=r"a checkpoint needs \d+ MB, 0 MB are free"):
            saver.save(position(1))
    assert names(tmp_path) == []


class Slow:
    """Writes weights when it is let."""

    def __init__(self) -> None:
        self.began, self.go, self.failure = threading.Event(), threading.Event(), None

    def __call__(self, decoder: Any, folder: Path) -> None:
        self.began.set()
        assert self.go.wait(20)
        if self.failure is not None:
            raise self.failure
        directory.save(decoder, folder)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The snapshot is of the step of the call, whatever happens to the weights meanwhile."""
    slow, made = Slow(), tiny_trained(1, steps=2)
    before = states(made)
    with Saver(made, plan(tmp_path, save_weights=slow)) as saver:
        saver.save(position(2))
        with torch.no_grad():
            for p in made.parameters.values():
                p.add_(1.0)
        assert slow.began.wait(20)
        assert names(tmp_path) == ["step-00000002.part"]
        slow.go.set()
        saver.wait()
    fresh = tiny_trained(9)
    assert restore(tmp_path, fresh, MADE_FOR) == position(2)
    assert all(torch.equal(v, before[k]) for k, v in states(fresh).items())


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    slow, made = Slow(), tiny_trained(1, steps=2)
    with Saver(made, plan(tmp_path, save_weights=slow)) as saver:
        saver.save(position(2))
        threading.Timer(0.2, slow.go.set).start()
        started = time.monotonic()
        saver.save(position(3))
        assert time.monotonic() - started > 0.15
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_what_the_writer_meets_is_raised_by_the_next_step(tmp_path: Path) -> None:
    slow, made = Slow(), tiny_trained(1, steps=2)
    slow.failure = OSError(28, "No space left on device", str(tmp_path / "x"))
    slow.go.set()
    with Saver(made, plan(tmp_path, save_weights=slow)) as saver:
        saver.check()
        saver.save(position(2))
        assert saver._thread is not None
        saver._thread.join()
        with pytest.raises(UserError, match="the disk is full; free some space and run the same"):
            saver.check()
        saver.check()  # it is told once
    assert names(tmp_path) == []


def test_a_full_disk_in_the_loop_is_a_sentence_and_the_run_goes_on_later(tmp_path: Path) -> None:
    whole, broken, again = (tiny_decoder() for _ in range(3))
    train(Ranks(0, 1), whole, make_job(tmp_path / "whole", tiny_loop()))
    left = [2]

    def full(decoder: Any, folder: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device", str(folder / "model.safetensors"))
        directory.save(decoder, folder)

    loop = tiny_loop(checkpoint_steps=2)
    with pytest.raises(UserError, match="the disk is full; free some space and run the same"):
        train(Ranks(0, 1), broken, make_job(tmp_path / "broken", loop, save_weights=full))
    assert names(tmp_path / "broken/resume") == ["step-00000002"]
    assert train(Ranks(0, 1), again, make_job(tmp_path / "broken", loop)).step == 10
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
