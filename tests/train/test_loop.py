"""The loop: resumed = undisturbed, same seed = same bytes, and a model that learns."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training import CONTEXT, Disturbed, add_lora, make_job, random_set, tiny_decoder, tiny_loop

from microlm.core.errors import CheckFailed, UserError
from microlm.core.metrics import read_metrics
from microlm.model import directory, lora
from microlm.model.transformer import Decoder
from microlm.train.batches import PackedRows
from microlm.train.job import Job
from microlm.train.loop import train
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks
from microlm.train.reporter import TIMED

ALONE = Ranks(0, 1)


def weights(decoder: Decoder, folder: Path) -> bytes:
    directory.save(decoder, folder)
    return (folder / "model.safetensors").read_bytes()


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics but for their times."""
    return [
        {k: v for k, v in row.items() if k not in ("time", *TIMED)}
        for row in read_metrics(folder / "logs/metrics.jsonl")
    ]


def run(folder: Path, seed: int = 0, **fields: Any) -> tuple[bytes, list[dict[str, Any]]]:
    decoder = tiny_decoder(seed)
    train(ALONE, decoder, make_job(folder, tiny_loop(**fields), seed))
    return weights(decoder, folder), rows(folder)


def interrupted(folder: Path, call: int, act: Callable[[], object], **fields: Any) -> Job:
    """A run that was stopped in its n-th micro-batch (two a step)."""
    job = make_job(folder, tiny_loop(**fields), objective=Disturbed(call, act))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(ALONE, tiny_decoder(), job)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    return make_job(folder, tiny_loop(**fields))


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path: Path) -> None:
    first, again, other = (run(tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1)))
    assert first == again
    assert first[0] != other[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("call", "names"), [(1, []), (9, ["step-00000003"]), (12, ["step-00000004"])], ids=["1", "9", "12"]
)
def test_resumed_equals_undisturbed(tmp_path: Path, number: int, call: int, names: list[str]) -> None:
    """Calls 1 and 2 validate, then there are two a step; a step that a signal meets is given up."""
    whole = run(tmp_path / "whole")
    job = interrupted(tmp_path / "cut", call, lambda: signal.raise_signal(number))
    decoder = tiny_decoder(seed=5 if names else 0)  # the checkpoint brings the weights
    assert [p.name for p in job.resume.glob("step-*")] == names
    train(ALONE, decoder, job)
    assert (weights(decoder, tmp_path / "cut"), rows(tmp_path / "cut")) == whole


def test_resumed_keeps_the_times_of_its_earlier_rows(tmp_path: Path) -> None:
    job = interrupted(tmp_path, 15, lambda: signal.raise_signal(signal.SIGINT))
    before = [row["time"] for row in read_metrics(tmp_path / "logs/metrics.jsonl")]
    train(ALONE, tiny_decoder(), job)
    after = [row["time"] for row in read_metrics(tmp_path / "logs/metrics.jsonl")]
    assert before
    assert after[: len(before)] == before


def test_rows_that_a_crash_lost_come_back_from_the_checkpoint(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    job = interrupted(tmp_path / "cut", 15, lambda: signal.raise_signal(signal.SIGINT))
    file = job.logs / "metrics.jsonl"
    file.write_text(file.read_text()[:100])
    train(ALONE, tiny_decoder(), job)
    assert rows(tmp_path / "cut") == whole[1]


def test_a_crash_between_checkpoints_repeats_the_steps_since(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    job = make_job(tmp_path / "cut", tiny_loop(), objective=Disturbed(15, lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train(ALONE, tiny_decoder(), job)
    assert [p.name for p in job.resume.glob("step-*")] == ["step-00000004"]
    decoder = tiny_decoder()
    train(ALONE, decoder, make_job(tmp_path / "cut", tiny_loop()))
    assert (weights(decoder, tmp_path / "cut"), rows(tmp_path / "cut")) == whole


@pytest.mark.parametrize("calls", [19, 21])
def test_a_stop_in_the_last_step_still_stops(tmp_path: Path, calls: int) -> None:
    """Call 19 is in step 10 of 10, call 21 in the validation after it."""
    whole = run(tmp_path / "whole", validation_steps=100)
    job = interrupted(
        tmp_path / "cut", calls, lambda: signal.raise_signal(signal.SIGINT), validation_steps=100
    )
    decoder = tiny_decoder(seed=5)
    assert train(ALONE, decoder, job).step == 10
    assert (weights(decoder, tmp_path / "cut"), rows(tmp_path / "cut")) == whole


@pytest.mark.parametrize("call", [15, 16, 25, 26])
def test_a_stop_in_a_validation_gives_it_up_until_later(tmp_path: Path, call: int) -> None:
    """Calls 15 and 16 validate after step 6; calls 25 and 26 after the last step, 10."""
    whole = run(tmp_path / "whole")
    job = interrupted(tmp_path / "cut", call, lambda: signal.raise_signal(signal.SIGINT))
    step = 6 if call < 20 else 10
    assert max(p.name for p in job.resume.glob("step-*")) == f"step-{step:08d}"
    lost = call in (15, 25)
    assert [r["step"] for r in rows(tmp_path / "cut")][-1] == (step - 3 + 2 * (step == 10) if lost else step)
    decoder = tiny_decoder(seed=5)
    train(ALONE, decoder, job)
    assert (weights(decoder, tmp_path / "cut"), rows(tmp_path / "cut")) == whole


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    job = interrupted(tmp_path, 3, twice)
    assert not list(job.resume.iterdir())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_resumes_too(tmp_path: Path, dropout: float) -> None:
    whole, cut, again = (add_lora(tiny_decoder(), dropout=dropout) for _ in range(3))
    save = partial(lora.save_adapter, base_name="base", base_digest="0")
    torch.manual_seed(0)
    train(ALONE, whole, make_job(tmp_path / "whole", tiny_loop(), save_weights=save))
    act = Disturbed(9, lambda: signal.raise_signal(signal.SIGINT))
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        train(ALONE, cut, make_job(tmp_path / "cut", tiny_loop(), objective=act, save_weights=save))
    torch.manual_seed(1)
    train(ALONE, again, make_job(tmp_path / "cut", tiny_loop(), save_weights=save))
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_micro_batches_only_split_the_work(tmp_path: Path) -> None:
    whole, split = tiny_decoder(), tiny_decoder()
    train(ALONE, whole, make_job(tmp_path / "a", tiny_loop(micro_rows=4)))
    train(ALONE, split, make_job(tmp_path / "b", tiny_loop(micro_rows=3)))  # 3 rows, then 1
    losses = [[r["loss"] for r in rows(tmp_path / f) if "loss" in r] for f in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_rows_say_what_happened(tmp_path: Path) -> None:
    _, found = run(tmp_path)
    assert [r["step"] for r in found] == [0, 3, 6, 9, 10]
    assert [r["step"] for r in found if "validation_loss" in r] == [0, 6, 10]
    assert [r["tokens"] for r in found] == [s * 4 * CONTEXT for s in (0, 3, 6, 9, 10)]
    assert found[-1]["loss"] < found[1]["loss"]


def test_without_validation_rows_there_are_losses_only(tmp_path: Path) -> None:
    train(ALONE, tiny_decoder(), make_job(tmp_path, tiny_loop(), validation=None))
    assert all("validation_loss" not in r for r in rows(tmp_path))
    _, found = run(tmp_path / "zero", validation_rows=0)
    assert [r["step"] for r in found] == [3, 6, 9, 10]


def test_a_loss_that_is_not_finite_fails_the_check(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.lm_head.weight[5] = torch.inf
    with pytest.raises(CheckFailed, match=r"tiny: loss is .* at step 0; lower the rates"):
        train(ALONE, decoder, make_job(tmp_path, tiny_loop(), validation=None))


def test_a_context_beyond_the_positions_is_a_sentence(tmp_path: Path) -> None:
    loop = tiny_loop(context=CONTEXT * 2)
    with pytest.raises(UserError, match=r"tiny: loop.context 64 is longer than the model's 32 positions"):
        train(ALONE, tiny_decoder(), make_job(tmp_path, loop))


@pytest.mark.parametrize("adapter", [False, True])
def test_one_batch_can_be_learnt_by_heart(tmp_path: Path, adapter: bool) -> None:
    decoder = tiny_decoder()
    if adapter:  # a frozen head must be large enough to be sure of a token, as a trained one is
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, p in decoder.named_parameters():
                if p.dim() == 2:
                    outer = "embed" in name or "lm_head" in name
                    p.normal_(0, 1.0 if outer else 0.2, generator=generator)
        add_lora(decoder, rank=16)
    one = PackedRows({"talk": random_set("talk", 0, 4, conversations=True)}, {}, CONTEXT, 0)
    loop = tiny_loop(steps=150, batch_rows=2, log_steps=10, checkpoint_steps=1000)
    rates = OptimRecipe(warmup_steps=10, adapter_lr=0.01)
    train(ALONE, decoder, make_job(tmp_path, loop, optim=rates, train=one, validation=None))
    assert rows(tmp_path)[-1]["loss"] < 0.05


def test_the_loop_recipe_counts_steps() -> None:
    assert tiny_loop(steps=7).steps == 7
    assert tiny_loop(tokens=1).steps == 1
    assert json.loads(tiny_loop().model_dump_json())["dtype"] == "float32"
