"""Moments that a run may be cut off at, and what is then done again, told or refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from artifacts import write_data, write_tokenizer
from torch import Tensor
from training import CONTEXT, Disturbed, make_job, tiny_decoder, tiny_loop, tiny_trained

from microlm.cli import main
from microlm.core.artifact import Artifact, open_artifact
from microlm.core.errors import UserError
from microlm.core.metrics import read_metrics
from microlm.core.recipe import build
from microlm.model import directory
from microlm.model.transformer import Decoder
from microlm.text import shards
from microlm.text.shards import TokenizeRecipe
from microlm.train import loop as loops
from microlm.train import objectives, pretrain
from microlm.train.batches import Batch
from microlm.train.checkpoint import Position, SavePlan, Saver, publish_best, random_state, restore
from microlm.train.checkpoint import trained as tensors
from microlm.train.job import Job
from microlm.train.loop import train
from microlm.train.pretrain import PretrainRecipe
from microlm.train.ranks import Ranks
from microlm.train.reporter import TIMED, write_summary
from microlm.train.tuning import sft
from microlm.train.tuning.sft import SftRecipe

ALONE = Ranks(0, 1)


def rows(folder: Path) -> list[dict[str, Any]]:
    found = read_metrics(folder / "logs/metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("time", *TIMED)} for row in found]


def same(a: Decoder, b: Decoder) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def run(folder: Path, objective: Any = objectives.next_token, **loop: Any) -> Decoder:
    decoder = tiny_decoder()
    train(ALONE, decoder, make_job(folder, tiny_loop(**loop), objective=objective))
    return decoder


def test_validations_do_not_wait_for_a_row(tmp_path: Path) -> None:
    run(tmp_path, log_steps=4, validation_steps=3)
    found = rows(tmp_path)
    assert [r["step"] for r in found] == [0, 3, 4, 6, 8, 9, 10]
    assert [r["step"] for r in found if "validation_loss" in r] == [0, 3, 6, 9, 10]


@pytest.mark.parametrize("micro_rows", [1, 3, 4])
def test_validation_is_of_the_same_rows_however_they_are_split(tmp_path: Path, micro_rows: int) -> None:
    for name, size in (("two", 2), ("other", micro_rows)):
        run(tmp_path / name, micro_rows=size, tokens=1)
    two, other = (rows(tmp_path / name)[0]["validation_loss"] for name in ("two", "other"))
    assert other == pytest.approx(two, rel=1e-6)


def test_killed_at_its_first_step_a_run_has_one_first_row(tmp_path: Path) -> None:
    """With `roll_back` there is a checkpoint of step 0, after the first validation."""
    whole = run(tmp_path / "whole", nonfinite="roll_back")
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "cut", Disturbed(3, lambda: 1 / 0), nonfinite="roll_back")
    assert [p.name for p in (tmp_path / "cut/resume").glob("step-*")] == ["step-00000000"]
    assert same(run(tmp_path / "cut", nonfinite="roll_back"), whole)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


class Noisy:
    """A loss with noise; that of the sixth batch is not finite, and a stop comes into the one after it."""

    def __init__(self, spoiled: int, stop: int) -> None:
        self.spoiled, self.stop, self.call = spoiled, stop, 0

    def __call__(self, hidden: Tensor, decoder: Decoder, batch: Batch) -> Tensor:
        self.call += 1
        if self.call == self.stop:
            signal.raise_signal(signal.SIGINT)
        loss = objectives.next_token(hidden, decoder, batch) * (1 + 0.1 * torch.rand(()))
        return loss * torch.nan if self.call == self.spoiled else loss


def test_a_stop_after_a_step_that_was_left_out_keeps_the_random_states(tmp_path: Path) -> None:
    quiet = {"nonfinite": "skip", "validation_rows": 0}
    torch.manual_seed(0)
    whole = run(tmp_path / "whole", Noisy(12, 0), **quiet)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Noisy(12, 13), **quiet)
    assert max((tmp_path / "cut/resume").glob("step-*")).name == "step-00000005"
    torch.manual_seed(9)
    assert same(run(tmp_path / "cut", Noisy(0, 0), **quiet), whole)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_changed_digit_in_the_metrics_is_put_right(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Disturbed(15, lambda: signal.raise_signal(signal.SIGINT)))
    file = tmp_path / "cut/logs/metrics.jsonl"
    text = file.read_text()
    at = text.index('"loss": ') + len('"loss": ')
    file.write_text(text[:at] + str(9 - int(text[at])) + text[at + 1 :])
    run(tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_there_must_be_room_on_the_disk_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(loops, "warm_up", compiled)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10_000))
    with pytest.raises(UserError, match=r"training .3 more checkpoints. needs \d+ MB, 0 MB are free"):
        run(tmp_path)


def test_other_data_after_the_last_step(tmp_path: Path) -> None:
    """Stopped in the validation after step 10 of 10, then resumed on shards that have changed."""

    def job(objective: Any, digest: str) -> Job:
        made_for = {"inputs": {"shards": digest}}
        loop = tiny_loop(allow_mismatch=True)
        return make_job(tmp_path, loop, objective=objective, fingerprint=made_for)

    act = Disturbed(25, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(ALONE, tiny_decoder(), job(act, "a"))
    decoder, again = tiny_decoder(), job(objectives.next_token, "b")
    with pytest.warns(UserWarning, match="inputs.shards was a, is b"):
        at = train(ALONE, decoder, again)
    write_summary(again, decoder, at)
    told = json.loads((again.logs / "summary.json").read_text())
    assert told["allowed_mismatches"] == ["from step 10: inputs.shards was a, is b"]


@pytest.mark.parametrize(
    ("path", "stays"),
    [
        ("inputs.data", False),
        ("recipe.tasks", False),
        ("recipe.too_long", False),
        ("recipe.answers.prompts", False),
        ("recipe.answers.group", False),
        ("recipe.answers.max_tokens", False),
        ("recipe.answers.temperature", True),
        ("recipe.optim.matrix_lr", True),
    ],
)
def test_a_place_in_another_order_is_given_up(tmp_path: Path, path: str, stays: bool) -> None:
    def made_for(value: Any) -> dict[str, Any]:
        for key in reversed(path.split(".")):
            value = {key: value}
        return dict(value)

    trained, place = tiny_trained(1, steps=1), {"place": 3}
    plan = SavePlan(tmp_path / "resume", 2, False, directory.save, made_for("a"))
    with Saver(trained, plan) as saver:
        saver.save(Position(1, data=place, random=random_state()))
    with pytest.warns(UserWarning, match=f"{path} was a, is b"):
        at = restore(tmp_path / "resume", trained, made_for("b"), allow_mismatch=True)
    assert at and at.data == (place if stays else {})


def test_a_snapshot_is_made_in_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [0]
    host = tensors._host

    def counted(tensor: Tensor) -> Tensor:
        made[0] += 1
        return host(tensor)

    trained = tiny_trained(1, steps=1)
    monkeypatch.setattr(tensors, "_host", counted)
    snapshot = tensors.Snapshot(trained)
    for _ in range(3):
        snapshot.take()
    assert made[0] == len(trained.parameters) + len(trained.states())
    for optimizer in trained.optimizers:
        optimizer.state.clear()
    snapshot.take()
    assert not snapshot.states


def test_damaged_best_weights_are_named_and_replaced(tmp_path: Path) -> None:
    def save(step: int, loss: float) -> None:
        trained = tiny_trained(step, steps=1)
        plan = SavePlan(tmp_path / "resume", 2, True, directory.save, {})
        with Saver(trained, plan) as saver:
            saver.save(Position(step, history=[{"step": float(step), "validation_loss": loss}]))

    save(1, 2.0)
    file = tmp_path / "resume/best-00000001/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)
    words = r"best-00000001/model.safetensors: changed since it was written; left out"
    with pytest.warns(UserWarning, match=words):
        assert not publish_best(tmp_path / "resume", tmp_path / "best")
    with pytest.warns(UserWarning, match=words):
        save(2, 3.0)
    assert publish_best(tmp_path / "resume", tmp_path / "best")
    assert json.loads((tmp_path / "best/checkpoint.json").read_text())["step"] == 2


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("tokens")
    data = write_data(folder / "data")
    tokenizer = write_tokenizer(folder / "tokenizer", data)
    return shards.run(TokenizeRecipe(out=str(folder / "shards"), data=data.url, tokenizer=tokenizer.url))


SHAPE = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 64}
LOOP = {
    "tokens": 6 * 4 * CONTEXT, "context": CONTEXT, "batch_rows": 4, "micro_rows": 2, "dtype": "float32",
    "compile": False, "validation_rows": 4, "workers": 0, "checkpoint_steps": 2,
    "samples": {"steps": 3, "prompts": ["a"], "tokens": 2},
}  # fmt: skip


def broken(
    decoder: Decoder, tokenizer: Path, prompts: Sequence[str], tokens: int, check: Callable[[], None]
) -> list[str]:
    raise ZeroDivisionError


def cut_off(run_stage: Callable[..., Artifact], recipe: Any) -> None:
    """Run a stage that breaks at step 3, its last checkpoint of step 2."""
    with pytest.raises(ZeroDivisionError):
        run_stage(recipe, sample=broken)
    assert [p.name for p in Path(f"{recipe.out}.tmp/resume").glob("step-*")] == ["step-00000002"]


def test_other_settings_are_refused_and_allowed_by_the_command(
    tokens: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {
        "out": str(tmp_path / "model"), "shards": tokens.url, "architecture": SHAPE, "loop": LOOP,
        "parallel": {"processes": 1},
    }  # fmt: skip
    cut_off(pretrain.run, build(PretrainRecipe, fields, "pretrain"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stage": "pretrain", **fields}))
    words = ["pretrain", str(recipe), "optim.matrix_lr=0.01", "loop.samples.steps=0"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "recipe.optim.matrix_lr was 0.02, is 0.01" in capsys.readouterr().err
    with (
        pytest.raises(SystemExit) as ended,
        pytest.warns(UserWarning, match="going on although settings differ"),
    ):
        main([*words, "--allow-mismatch"])
    assert not ended.value.code
    told = open_artifact(str(tmp_path / "model")).manifest["metrics"]["allowed_mismatches"]
    assert told == ["from step 2: recipe.optim.matrix_lr was 0.02, is 0.01"]


def test_an_adapters_stage_goes_on_where_it_was(tokens: Artifact, tmp_path: Path) -> None:
    """The fingerprint of the same recipe is the same after it was written and read."""
    fields = {
        "shards": tokens.url, "parallel": {"processes": 1}, "loop": LOOP,
        "lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}, "mixture": {"documents": 1.0},
    }  # fmt: skip
    base = {
        "out": str(tmp_path / "base"), "shards": tokens.url, "architecture": SHAPE,
        "loop": LOOP | {"samples": {}}, "parallel": {"processes": 1},
    }  # fmt: skip
    model = pretrain.run(build(PretrainRecipe, base, "pretrain")).url

    def recipe(name: str, **loop: Any) -> SftRecipe:
        values = {"out": str(tmp_path / name), "model": model, **fields, "loop": LOOP | loop}
        return build(SftRecipe, values, "sft")

    whole = sft.run(recipe("whole", samples={}))
    cut_off(sft.run, recipe("cut"))
    again = sft.run(recipe("cut", samples={}))
    assert again.digest == whole.digest
    assert again.manifest["times"]["resumed"]
