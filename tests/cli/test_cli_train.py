"""`microlm plan`, the `--dry-run` of training and `microlm train overfit`, before and after the stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from artifacts import sign, write_data
from tiny_model import write_tiny_model
from training import CONTEXT, write_recipe

from microlm.cli import main
from microlm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline from data to an adapter, whose stages only these tests make."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_data(folder / "data")
    return write_recipe(folder / "recipe.yaml", str(folder / "data"), str(folder / "out"))


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(list(words))
    return int(e.value.code or 0)


def plans(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert call(*words, "--json") == 0
    return list(json.loads(capsys.readouterr().out)["plans"])


def test_a_plan_before_anything_is_made(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plans(capsys, "plan", str(recipe))
    assert [(p["name"], p["stage"]) for p in found] == [
        ("pretrain", "pretrain"),
        ("sft", "sft"),
        ("lora", "sft"),
    ]
    base, tuned, adapter = found
    assert base["config"] == tuned["config"] == adapter["config"]
    assert base["config"]["vocab_size"] == 320
    assert base["epochs"] == {}
    assert base["trained"] == base["parameters_total"] == tuned["trained"] > adapter["trained"] > 0
    assert base["tokens"] == 12 * 4 * CONTEXT
    assert base["peak_flops"] > 1e9 and base["seconds"] is None
    assert call("plan", str(recipe)) == 0
    assert capsys.readouterr().out.count("parameters  ") == 3
    assert not (recipe.parent / "out").exists()


def test_a_plan_of_grpo_before_its_model_is_made(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = json.loads(recipe.read_text())
    loop = {"context": CONTEXT, "micro_rows": 2}
    asked["stages"].append({
        "stage": "grpo", "model": "sft", "data": str(recipe.parent / "data"), "rewards": {"length": 1},
        "steps": 3, "answers": {"prompts": 2, "group": 4, "max_tokens": 8}, "loop": loop,
    })  # fmt: skip
    file = recipe.with_name("grpo.yaml")
    file.write_text(json.dumps(asked))
    *others, found = plans(capsys, "plan", str(file))
    assert found["config"] == others[0]["config"] and found["tokens"] == 3 * 8 * CONTEXT
    (held,) = plans(capsys, "grpo", str(file), "grpo.kl_weight=0.1", "--dry-run")
    memory = [each["memory"] for each in (others[0], found, held)]
    assert [m["answers"] > 0 for m in memory] == [False, True, True]
    assert [m["teacher"] > 0 for m in memory] == [False, False, True]
    assert call("train", "overfit", str(file), "--stage", "grpo") == 2
    assert "run it with few of them instead (grpo.steps=5)" in capsys.readouterr().err
    assert call("plan", str(file), "--measure", "--json") == 0
    out, err = capsys.readouterr()
    assert [p["tokens_per_s"] for p in json.loads(out)["plans"]] == [None] * 4
    assert err.count("not measured: ") == 4 and "stage 'grpo': not measured: grpo learns from answers" in err
    assert "shards is not made yet" in err


def test_a_dry_run_tells_what_the_stage_takes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = plans(
        capsys, "pretrain", str(recipe), "pretrain.architecture={preset: 26m}", "pretrain.loop.micro_rows=4",
        "--dry-run",
    )  # fmt: skip
    assert found["config"]["hidden_size"] == 512
    assert found["memory"]["total"] > found["memory"]["weights"] * 3
    (small,) = plans(capsys, "pretrain", str(recipe), "--dry-run")
    assert small["memory"]["total"] < found["memory"]["total"]
    (last,) = plans(capsys, "sft", str(recipe), "--dry-run")
    assert last["name"] == "lora"


def test_one_batch_is_learnt_by_heart(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And then the shards are there: the plan knows the epochs."""
    assert call("train", "overfit", str(recipe), "--steps", "120", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["last"] < 0.05 < found["first"]
    assert found["steps"] == 120 and found["steps_to_target"] < 120
    assert [p.name for p in sorted((recipe.parent / "out").iterdir())] == ["shards", "tokenizer"]
    base, *_ = plans(capsys, "plan", str(recipe))
    assert base["epochs"]["documents"] > 0
    (timed,) = plans(capsys, "plan", str(one(recipe)), "--measure")
    assert timed["seconds"] == pytest.approx(timed["tokens"] / timed["tokens_per_s"])


def one(recipe: Path) -> Path:
    """The pretraining stage of the pipeline as a recipe of its own."""
    entry = next(s for s in json.loads(recipe.read_text())["stages"] if s["stage"] == "pretrain")
    folder = recipe.parent / "out"
    entry |= {"shards": str(folder / "shards"), "out": str(folder / "alone"), "parallel": {"processes": 1}}
    path = recipe.with_name("one.yaml")
    path.write_text(json.dumps(entry))
    return path


def test_tuning_is_tried_on_the_model_before_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        call(
            "train",
            "overfit",
            str(recipe),
            "parallel.processes=1",
            "--stage",
            "sft",
            "--steps",
            "120",
            "--rows",
            "1",
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert "one batch: loss" in out and "(below 0.05 after" in out
    assert "pretrain" in err
    assert (recipe.parent / "out/pretrain").exists() and not (recipe.parent / "out/sft").exists()


def test_what_is_not_learnt_is_a_failed_check(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = [f"pretrain.optim.{name}_lr=1e-7" for name in ("matrix", "embedding", "head")]
    assert call("train", "overfit", str(recipe), *slow, "--steps", "12") == 1
    err = capsys.readouterr().err
    assert "check failed: one batch: loss" in err
    assert "it hardly moves: suspect rates far too low" in err


def test_mistakes_are_sentences(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "overfit", str(recipe), "--stage", "data") == 2
    assert "holds no training stage 'data'; training stages: pretrain, sft, lora" in capsys.readouterr().err
    bare = tmp_path / "bare.yaml"
    bare.write_text(
        json.dumps({"stage": "pretrain", "out": "x", "shards": "./none", "architecture": {"preset": "4m"}})
    )
    assert call("plan", str(bare)) == 2
    assert "none: is not made yet, so its vocabulary is unknown" in capsys.readouterr().err
    twice = tmp_path / "twice.yaml"
    twice.write_text(
        json.dumps(
            {"stage": "pretrain", "out": "x", "shards": "y", "architecture": {"preset": "4m", "size": "4m"}}
        )
    )
    assert call("plan", str(twice)) == 2
    assert "preset 4m and size 4m state the model twice" in capsys.readouterr().err
    tokenizer = tmp_path / "tokenizer.yaml"
    tokenizer.write_text(json.dumps({"stage": "tokenizer", "out": "x", "data": "y"}))
    assert call("plan", str(tokenizer)) == 2
    assert "the recipe trains nothing" in capsys.readouterr().err


def test_a_dry_run_knows_the_vocabulary_of_a_model_that_is_the_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sign(tmp_path / "model", "model", lambda work: write_tiny_model(work.path) and None)
    data = write_data(tmp_path / "data")
    stages = [
        {"stage": "tokenize", "name": "shards", "data": data.url, "tokenizer": model.url},
        {"stage": "sft", "model": model.url, "shards": "shards", "loop": {"tokens": 4096, "context": 64}},
    ]
    where = tmp_path / "recipe.yaml"
    where.write_text(json.dumps({"output": str(tmp_path / "out"), "stages": stages}))
    (found,) = plans(capsys, "sft", str(where), "--dry-run")
    assert found["config"]["vocab_size"] == Tokenizer.load(model.path).vocab_size
