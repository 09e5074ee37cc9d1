"""The stage `grpo` as the command line runs it: from a model and conversations to a signed directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from answering import CHATS, recipe, write_artifacts
from artifacts import sign

from microlm.cli import main, stages
from microlm.core.artifact import Artifact, Workspace
from microlm.core.errors import UserError
from microlm.core.metrics import read_metrics
from microlm.model import directory, lora
from microlm.text.tokenizer import Tokenizer
from microlm.train.batches.prompts import NO_GOLD, make_prompts
from microlm.train.tuning import grpo


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    return write_artifacts(tmp_path_factory.mktemp("made"))


def run(out: Path, made: tuple[Artifact, Artifact], **fields: Any) -> Artifact:
    model, data = made
    return stages.load("grpo").run(recipe(out=str(out), model=model.url, data=data.url, **fields))


def test_it_leaves_a_model_and_tells_its_figures(tmp_path: Path, made: tuple[Artifact, Artifact]) -> None:
    fields: dict[str, Any] = {"rewards": {"length": 1.0, "ended": 0.5}, "loop": {"keep_best": True}}
    first = run(tmp_path / "a", made, **fields)
    assert (first.kind, first.manifest["inputs"].keys()) == ("model", {"model", "data"})
    assert directory.load(first.path).config == directory.load(made[0].path).config
    assert directory.load(first.path / "best").config == directory.load(made[0].path).config
    told = first.manifest["metrics"]
    assert told["epochs"] == {"prompts": 2.4} and told["conversations_not_asked"] == {}
    rows = read_metrics(first.path / "logs/metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert row["reward"] == pytest.approx(row["reward_length"] + 0.5 * row["reward_ended"])
        assert 0 <= row["rollout_gap"] < 1e-5 and row["clipped"] == 0 and "kl" not in row
    for row in (rows[0], rows[2], rows[4]):  # greedy answers to held-out prompts
        assert row["validation_loss"] == pytest.approx(-row["validation_reward"])
        assert "bits_per_byte" not in row
    made_rows = told["tokens"] / (4 * 64)  # of answers that share rows: fewer than there are answers
    assert made_rows < 12 and f"4 steps of {made_rows:g} rows" in (first.path / "logs/loss.html").read_text()
    assert run(tmp_path / "b", made, **fields).digest == first.digest
    assert run(tmp_path / "c", made, **fields, seed=1).digest != first.digest


def test_an_adapter_begins_at_its_base(tmp_path: Path, made: tuple[Artifact, Artifact]) -> None:
    found = run(tmp_path / "a", made, lora={"rank": 4}, kl_weight=0.1, answers={"updates": 2}, steps=3)
    assert found.kind == "adapter"
    lora.load_adapter(directory.load(made[0].path), found.path, made[0].digest)
    rows = read_metrics(found.path / "logs/metrics.jsonl")
    assert rows[0]["validation_kl"] == rows[1]["kl"] == 0.0 < rows[-1]["kl"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"loop": {"tokens": 99}}, "loop.tokens follows from the answers here; set steps"),
        ({"loop": {"document_mask": False}}, "loop.document_mask must be true"),
        ({"answers": {"max_tokens": 64}}, "leaves no room for a prompt in loop.context 64"),
        ({"answers": {"group": 1}}, "answers.group"),
        ({"rewards": {}}, "none has a weight above 0"),
        ({"lora": {"dropout": 0.1}}, r"lora\.dropout must be 0"),
    ],
)
def test_what_cannot_be_is_refused_at_once(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        recipe(**fields)


def test_what_is_missing_is_named(tmp_path: Path, made: tuple[Artifact, Artifact]) -> None:
    model, data = made
    asked = recipe(out=str(tmp_path / "a"), model=model.url, data=data.url)
    with pytest.raises(UserError, match="needs somebody who answers and who judges"):
        grpo.run(asked)
    with pytest.raises(UserError, match="no conversations of 'chats'; did you mean 'chat'"):
        run(tmp_path / "b", made, tasks=["chats"])
    with pytest.raises(UserError, match=r"json_schema: .* is no file"):
        run(tmp_path / "c", made, json_schema=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="5 are longer than the context allows"):
        run(tmp_path / "d", made, answers={"max_tokens": 60})
    with pytest.raises(UserError, match="context 1024 is longer than the model's 512 positions"):
        run(tmp_path / "e", made, loop={"context": 1024})


def test_what_no_reward_can_judge_is_not_asked(tmp_path: Path, made: tuple[Artifact, Artifact]) -> None:
    """No gold answer here holds a number or triples."""
    both = {"arithmetic": 1, "extraction": 1, "length": 0}
    with pytest.raises(UserError, match=f"5 are {NO_GOLD}.; choose other tasks, or rewards"):
        run(tmp_path / "a", made, rewards=both)


def test_a_prompt_that_cannot_be_judged_is_counted(tmp_path: Path, made: tuple[Artifact, Artifact]) -> None:
    def talks(work: Workspace) -> None:
        said = [("1+1", "2"), ("2+2", "four"), ("2+3", "5")]
        lines = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in said
        ]
        work.write_jsonl("conversations/train.jsonl", lines)

    data = sign(tmp_path / "data", "data", talks)
    found = run(tmp_path / "a", (made[0], data), rewards={"arithmetic": 1}, steps=1)
    assert found.manifest["metrics"]["conversations_not_asked"] == {NO_GOLD: 1}
    assert found.manifest["metrics"]["epochs"] == {"prompts": 1.5}


def test_held_out_prompts_that_cannot_be_asked_are_told(
    tmp_path: Path, made: tuple[Artifact, Artifact]
) -> None:
    def talks(work: Workspace) -> None:
        for split, question in (("train", "1+1"), ("validation", "x" * 90)):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "2"}]
            work.write_jsonl(f"conversations/{split}.jsonl", [{"messages": turns}])

    data = sign(tmp_path / "data", "data", talks)
    with pytest.warns(UserWarning, match="nothing is validated: validation split: data: no conversation"):
        found = run(tmp_path / "a", (made[0], data), steps=1)
    assert not any("validation_loss" in r for r in read_metrics(found.path / "logs/metrics.jsonl"))


def test_no_more_prompts_are_made_than_are_asked(made: tuple[Artifact, Artifact]) -> None:
    chats, tokenizer = iter(CHATS), Tokenizer.load(made[0].path)
    found = make_prompts(chats, (), tokenizer, 60, most=2)
    assert [p.gold for p in found.asked] == ["aaa", "bb"] and len(list(chats)) == 2


def test_a_schema_is_part_of_the_key(tmp_path: Path, made: tuple[Artifact, Artifact]) -> None:
    schema = tmp_path / "schema.json"
    keys = []
    for text in ({"type": "object"}, {"type": "object", "maxProperties": 1}):
        schema.write_text(json.dumps(text))
        keys.append(run(tmp_path / "a", made, rewards={"json": 1}, json_schema=str(schema), steps=1).key)
    assert keys[0] != keys[1]


def code_of(*words: str) -> object:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return end.value.code


def test_a_dry_run_tells_the_most_it_takes(
    tmp_path: Path, made: tuple[Artifact, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = made
    file = tmp_path / "r.yaml"
    fields = recipe(out=str(tmp_path / "a"), model=model.url, data=data.url).model_dump(mode="json")
    del fields["out"]
    fields["loop"] = {k: v for k, v in fields["loop"].items() if k not in ("tokens", "batch_rows")}
    file.write_text(json.dumps({"stage": "grpo", "out": str(tmp_path / "a"), **fields}))
    assert code_of("grpo", str(file), "--dry-run", "--json") == 0
    [plan] = json.loads(capsys.readouterr().out)["plans"]
    assert (plan["steps"], plan["batch_tokens"], plan["epochs"]) == (4, 12 * 64, {"prompts": 2.4})
    assert code_of("plan", str(file), "--measure") == 0
    assert "not measured: grpo learns from answers that it writes itself" in capsys.readouterr().err
    assert code_of("train", "overfit", str(file)) == 2
    assert "grpo learns from answers that it writes itself" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
