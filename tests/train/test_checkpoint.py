"""Checkpoints: what is written comes back bit for bit; what is damaged is passed over."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from training import make_job, tiny_decoder, tiny_loop

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.train import checkpoint, optim
from microlm.train.checkpoint import Position
from microlm.train.loop import train
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks

Parts = tuple[dict[str, nn.Parameter], list[torch.optim.Optimizer]]


def parts(seed: int = 0, steps: int = 0) -> Parts:
    """Parameters and optimizers, with some steps of noise behind them."""
    decoder = tiny_decoder(seed)
    named = dict(decoder.named_parameters())
    optimizers = optim.make(decoder, OptimRecipe())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    return named, optimizers


def states(
    named: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    found = {n: p.detach().clone() for n, p in named.items()}
    for n, p in named.items():
        for optimizer in optimizers:
            found |= {f"{n}/{k}": v.clone() for k, v in optimizer.state.get(p, {}).items()}
    return found


def same(a: Parts, b: Parts) -> bool:
    left, right = states(*a), states(*b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def write_three(folder: Path) -> dict[int, Parts]:
    """Checkpoints of steps 1, 2 and 3, each with weights of its own."""
    made = {}
    for step in (1, 2, 3):
        made[step] = parts(step, steps=step)
        at = Position(step, step * 10, [{"step": float(i), "loss": 0.1} for i in range(step)], [0.25])
        checkpoint.save(folder, *made[step], at)
    return made


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    made = write_three(tmp_path)
    fresh = parts(9)
    at = checkpoint.restore(tmp_path, *fresh)
    assert at == Position(3, 30, [{"step": float(i), "loss": 0.1} for i in range(3)], [0.25])
    assert same(fresh, made[3])


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    write_three(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"step-0000000{s}.{e}" for s in (2, 3) for e in ("json", "safetensors")]


def test_without_a_checkpoint_nothing_moves(tmp_path: Path) -> None:
    fresh = parts(9)
    assert checkpoint.restore(tmp_path, *fresh) == Position()
    assert same(fresh, parts(9))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "cut off": lambda head, tensors: tensors.write_bytes(tensors.read_bytes()[:1000]),
    "a flipped bit of a weight": lambda head, tensors: flip(tensors, -5),
    "a flipped bit of the step": lambda head, tensors: head.write_text(
        head.read_text().replace('\\"step\\": 3', '\\"step\\": 2')
    ),
    "no tensors": lambda head, tensors: tensors.unlink(),
    "an empty head": lambda head, tensors: head.write_text(""),
    "half a head": lambda head, tensors: head.write_text(head.read_text()[:40]),
    "another head": lambda head, tensors: head.write_text(json.dumps([1])),
    "a head of an older format": lambda head, tensors: head.write_text(json.dumps({"step": 3})),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, what: str) -> None:
    made = write_three(tmp_path)
    before = (tmp_path / "step-00000003.json").read_bytes()
    DAMAGE[what](tmp_path / "step-00000003.json", tmp_path / "step-00000003.safetensors")
    if "no tensors" not in what and "weight" not in what and "cut" not in what:
        assert (tmp_path / "step-00000003.json").read_bytes() != before
    fresh = parts(9)
    assert checkpoint.restore(tmp_path, *fresh).step == 2
    assert same(fresh, made[2])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", [1, 2])
def test_a_disk_that_refuses_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int
) -> None:
    made = write_three(tmp_path)
    left = [call]
    sync = os.fsync

    def refuse(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(code, "injected")
        sync(handle)

    monkeypatch.setattr(storage.os, "fsync", refuse)
    words = "the disk is full" if code == errno.ENOSPC else "input/output error"
    with pytest.raises(UserError, match=words):
        checkpoint.save(tmp_path, *parts(4, 1), Position(4))
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.part"))
    fresh = parts(9)
    assert checkpoint.restore(tmp_path, *fresh).step == 3
    assert same(fresh, made[3])


def test_a_full_disk_in_the_loop_is_a_sentence_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tiny_decoder(), tiny_decoder()
    train(Ranks(0, 1), whole, make_job(tmp_path / "whole", tiny_loop()))
    job = make_job(tmp_path / "broken", tiny_loop())
    left = [2]
    write = storage.write_atomic

    def refuse(path: Path, data: bytes) -> None:
        left[0] -= path.name.endswith(".json")
        if left[0] == 0:
            with storage.explain_write(path):
                raise OSError(errno.ENOSPC, "injected")
        write(path, data)

    monkeypatch.setattr(storage, "write_atomic", refuse)
    with pytest.raises(UserError, match="the disk is full; free some space and run the same command again"):
        train(Ranks(0, 1), broken, job)
    monkeypatch.undo()
    again = tiny_decoder()
    at = train(Ranks(0, 1), again, job)
    assert at.step == 10
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
