"""A loss that is not finite: the step is not applied, the samples are named, and the policy is followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import make_job, nan_on_rank, tiny_decoder, tiny_loop

from microlm.core import runtime
from microlm.core.errors import CheckFailed
from microlm.core.metrics import read_metrics
from microlm.core.recipe import Parallel
from microlm.model import directory
from microlm.model.transformer import Decoder
from microlm.train import objectives
from microlm.train.batches import Batch
from microlm.train.checkpoint import Position
from microlm.train.loop import train
from microlm.train.ranks import Ranks, launch
from microlm.train.reporter import TIMED

ALONE = Ranks(0, 1)
STEPS = 10


class Spoiled:
    """The plain objective, with a loss that is not finite at some calls (two a step, no validation)."""

    def __init__(self, *calls: int, value: float = torch.nan) -> None:
        self.calls, self.value, self.call = calls, value, 0

    def __call__(self, hidden: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
        self.call += 1
        loss = objectives.next_token(hidden, decoder, batch)
        return loss * self.value if self.call in self.calls else loss


def run(folder: Path, objective: Any, **fields: Any) -> tuple[Position, Decoder]:
    decoder = tiny_decoder()
    runtime.set_seed(0)  # as the stages do; making a decoder has drawn numbers
    loop = tiny_loop(STEPS, log_steps=1, validation_rows=0, **fields)
    return train(ALONE, decoder, make_job(folder, loop, objective=objective, validation=None)), decoder


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs/nonfinite.jsonl").read_text().splitlines()]


def rows(folder: Path) -> list[dict[str, Any]]:
    untold = {"time", *TIMED}
    found = read_metrics(folder / "logs/metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in untold} for row in found]


def samples_of_batch(folder: Path, number: int) -> dict[str, list[int]]:
    """The samples of a batch, counted from 0, as the stream says them."""
    stream = make_job(folder, tiny_loop()).train.batches(4)
    batch = [next(stream) for _ in range(number + 1)][-1]
    return {"documents": sorted({s for row in batch.samples for _, s in row})}


def test_stop_names_step_and_samples_and_loses_nothing(tmp_path: Path) -> None:
    words = r"tiny: loss is nan at step 5; lower the rates .*nonfinite.jsonl lists, or set loop.nonfin"
    with pytest.raises(CheckFailed, match=words):
        run(tmp_path, Spoiled(12))
    (event,) = events(tmp_path)
    expected = {"step": 5, "policy": "stop", "loss": "nan", "samples": samples_of_batch(tmp_path, 5)}
    assert {k: event[k] for k in expected} == expected
    assert [p.name for p in (tmp_path / "resume").glob("step-*")] == ["step-00000004"]
    at, decoder = run(tmp_path, objectives.next_token)  # the same command again, the cause removed
    whole = run(tmp_path / "whole", objectives.next_token)
    assert at.step == STEPS and not at.nonfinite
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), whole[1].parameters(), strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_skip_equals_a_run_that_never_saw_the_batch(tmp_path: Path, value: float) -> None:
    at, decoder = run(tmp_path / "spoiled", Spoiled(12, value=value), nonfinite="skip")
    assert (at.step, at.left_out, len(at.nonfinite)) == (STEPS, 1, 1)
    assert at.data["rows"] == (STEPS + 1) * 4
    assert all(bool(p.isfinite().all()) for p in decoder.parameters())

    clean = tiny_decoder()
    job = make_job(tmp_path / "clean", tiny_loop(STEPS, log_steps=1, validation_rows=0), validation=None)
    batches = job.train.batches

    def without(*args: Any) -> Any:
        stream = batches(*args)
        following = type(stream).__next__
        taken = iter(range(100))

        class Without(type(stream)):  # type: ignore[misc]
            def __next__(self) -> Batch:
                if next(taken) == 5:
                    following(self)
                return following(self)

        stream.__class__ = Without
        return stream

    job.train.batches = without  # type: ignore[method-assign]
    train(ALONE, clean, job)
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), clean.parameters(), strict=True))
    assert rows(tmp_path / "spoiled") == rows(tmp_path / "clean")


def test_a_gradient_that_is_not_finite_counts_too(tmp_path: Path) -> None:
    class Steep(Spoiled):
        def __call__(self, hidden: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
            self.call += 1
            loss = objectives.next_token(hidden, decoder, batch)
            return loss + (decoder.lm_head.weight[0, 0] * 0).sqrt() if self.call in self.calls else loss

    at, decoder = run(tmp_path, Steep(12), nonfinite="skip")
    (event,) = events(tmp_path)
    assert (event["loss"] != "nan", event["grad_norm"]) == (True, "nan")
    assert at.step == STEPS
    assert all(bool(p.isfinite().all()) for p in decoder.parameters())


def test_roll_back_returns_to_the_checkpoint_and_goes_on_after_the_batch(tmp_path: Path) -> None:
    """Step 6 is spoiled; the checkpoint is of step 4: batches 4, 5 and 6 are left out."""
    at, _ = run(tmp_path, Spoiled(14), nonfinite="roll_back")
    (event,) = events(tmp_path)
    assert (event["step"], event["back_to"], event["samples"]) == (6, 4, samples_of_batch(tmp_path, 6))
    assert (at.step, at.left_out, at.data["rows"]) == (STEPS, 3, (STEPS + 3) * 4)
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, STEPS + 1))
    assert at.tokens == rows(tmp_path)[-1]["tokens"] == STEPS * 4 * 32


def test_roll_back_goes_further_when_the_checkpoint_itself_is_bad(tmp_path: Path) -> None:
    """Steps 9 and again 8 (the checkpoint's) fail: the second return is to step 4."""
    at, _ = run(tmp_path, Spoiled(20, 21), nonfinite="roll_back")
    assert [(e["step"], e["back_to"]) for e in events(tmp_path)] == [(9, 8), (8, 4)]
    assert at.step == STEPS


def test_roll_back_has_a_start_to_return_to(tmp_path: Path) -> None:
    at, _ = run(tmp_path, Spoiled(3), nonfinite="roll_back")
    assert events(tmp_path)[0]["back_to"] == 0
    assert (at.step, at.left_out) == (STEPS, 2)


def test_without_an_earlier_checkpoint_roll_back_ends(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"no checkpoint before step 0 is left to go back to"):
        run(tmp_path, Spoiled(1, 2, 3, 4), nonfinite="roll_back")


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_there_is_a_limit(tmp_path: Path, policy: str) -> None:
    with pytest.raises(CheckFailed, match=r"after 2 such steps .loop.nonfinite_limit; .*jsonl lists"):
        run(tmp_path, Spoiled(12, 14, 16), nonfinite=policy, nonfinite_limit=2)
    assert len(events(tmp_path)) == 3


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_a_run_that_is_cut_off_afterwards_goes_on_the_same(tmp_path: Path, policy: str) -> None:
    """The position knows what was left out; call numbers begin anew, so the second run has none spoiled."""
    whole = run(tmp_path / "whole", Spoiled(6), nonfinite=policy)

    class Cut(Spoiled):
        def __call__(self, hidden: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
            if self.call == 20:
                raise ZeroDivisionError
            return super().__call__(hidden, decoder, batch)

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "cut", Cut(6), nonfinite=policy)
    at, decoder = run(tmp_path / "cut", objectives.next_token, nonfinite=policy)
    assert at == whole[0]
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), whole[1].parameters(), strict=True))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_agree_on_what_to_leave_out(tmp_path: Path) -> None:
    """Rank 1's share is spoiled: both return, and both end with the weights of one process."""
    two, one = Parallel(processes=2, threads=1), Parallel(processes=1, threads=1)
    for name, parallel in (("one", one), ("two", two)):
        launch(parallel, nan_on_rank, tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert [e["back_to"] for e in events(tmp_path / "two")] == [4]
    assert directory.load(tmp_path / "two").config.vocab_size == 64
