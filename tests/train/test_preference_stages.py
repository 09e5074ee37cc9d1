"""The stages `dpo` and `distil` from records to signed directories; killed and started again: equal bytes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from artifacts import PROSE, TURNS, sign, write_tokenizer
from training import CONTEXT

from microlm.cli import main
from microlm.core import runtime
from microlm.core.artifact import Artifact, Workspace
from microlm.core.errors import UserError
from microlm.core.metrics import read_metrics
from microlm.core.recipe import build
from microlm.model import directory, lora
from microlm.text import shards
from microlm.text.shards import TokenizeRecipe
from microlm.train import pretrain
from microlm.train.overfit import overfit
from microlm.train.plan import Trainable
from microlm.train.pretrain import PretrainRecipe
from microlm.train.tuning import distil, dpo, sft
from microlm.train.tuning.distil import DistilRecipe
from microlm.train.tuning.dpo import DpoRecipe
from microlm.train.tuning.sft import SftRecipe

SHAPE = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "intermediate_size": 64}
SMALLER = SHAPE | {"layers": 1, "intermediate_size": 32}
LONG = 2 * CONTEXT
LOOP = {
    "tokens": 6 * 4 * LONG, "context": LONG, "batch_rows": 4, "micro_rows": 2, "dtype": "float32",
    "compile": False, "validation_rows": 4, "validation_steps": 3,
}  # fmt: skip
ONE = {"processes": 1, "threads": 1}
WRONG = ("不知道。", "我不是诗人。", "She was.", '{"李白":{}}', "1912年。")


def write_data(out: Path) -> Artifact:
    """Documents, conversations and preferences on the same prompts."""
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in TURNS]
    pairs = [
        {"prompt": talk[:1], "chosen": talk[1]["content"], "rejected": wrong}
        for talk in talks
        for wrong in WRONG
        if wrong != talk[1]["content"]
    ]

    def body(work: Workspace) -> None:
        for split, times in (("train", 20), ("validation", 1)):
            work.write_jsonl(f"documents/{split}.jsonl", [{"text": t} for t in PROSE] * times)
            work.write_jsonl(f"conversations/{split}.jsonl", [{"messages": t} for t in talks] * times)
        work.write_jsonl("preferences/train.jsonl", pairs[::2])
        work.write_jsonl("preferences/validation.jsonl", pairs[1::2])

    return sign(out, "data", body)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """Shards and a pretrained model."""
    folder = tmp_path_factory.mktemp("made")
    data = write_data(folder / "data")
    tokenizer = write_tokenizer(folder / "tokenizer", data)
    tokens = shards.run(TokenizeRecipe(out=str(folder / "shards"), data=data.url, tokenizer=tokenizer.url))
    values = {"shards": tokens.url, "architecture": SHAPE, "loop": LOOP, "parallel": ONE}
    model = pretrain.run(build(PretrainRecipe, {"out": str(folder / "model"), **values}, "pretrain"))
    return tokens, model


def preferred(out: Path, made: tuple[Artifact, Artifact], **fields: Any) -> Artifact:
    values = {"out": str(out), "shards": made[0].url, "model": made[1].url, "loop": LOOP, "parallel": ONE}
    return dpo.run(build(DpoRecipe, values | fields, "dpo"))


def taught(out: Path, made: tuple[Artifact, Artifact], **fields: Any) -> Artifact:
    values = {"out": str(out), "shards": made[0].url, "teacher": made[1].url, "loop": LOOP, "parallel": ONE}
    return distil.run(build(DistilRecipe, values | fields, "distil"))


def payload(artifact: Artifact) -> set[str]:
    return {f["path"] for f in artifact.manifest["files"] if f["payload"]}


def test_dpo_leaves_a_model_that_serves(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    tuned = preferred(tmp_path / "dpo", made, loop=LOOP | {"keep_best": True})
    assert tuned.kind == "model" and payload(made[1]) < payload(tuned)
    assert (tuned.path / "best/model.safetensors").exists()
    assert (tuned.path / "tokenizer.json").read_bytes() == (made[1].path / "tokenizer.json").read_bytes()
    told, rows = tuned.manifest["metrics"], read_metrics(tuned.path / "logs/metrics.jsonl")
    assert rows[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert told["validation_accuracy"] > 0.5 and told["margin"] > rows[1]["margin"]
    assert told["bits_per_byte"] is None
    assert "Margin" in tuned.file("logs/loss.html").read_text()
    again = preferred(tmp_path / "again", made, loop=LOOP | {"keep_best": True})
    assert again.digest == tuned.digest


def test_dpo_by_adapter(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    """The start is the base: so is the reference."""
    tuned = preferred(tmp_path / "lora", made, lora={"rank": 4})
    assert tuned.kind == "adapter"
    decoder = directory.load(made[1].path)
    lora.load_adapter(decoder, tuned.path, base_digest=made[1].digest)
    rows = read_metrics(tuned.path / "logs/metrics.jsonl")
    assert rows[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_an_adapter_names_its_base_as_the_hub_does(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    def body(work: Workspace) -> None:
        for file in payload(made[1]):
            (work.path / file).write_bytes((made[1].path / file).read_bytes())
        work.metrics["adopted"] = {"origin": {"hub": "Qwen/Qwen3-0.6B", "commit": "a"}}

    adopted = sign(tmp_path / "adopted", "model", body)
    for model, name in ((adopted, "Qwen/Qwen3-0.6B"), (made[1], "model")):
        tuned = preferred(tmp_path / f"lora of {model.path.name}", (made[0], model), lora={"rank": 4})
        assert tuned.json("adapter_config.json")["base_model_name_or_path"] == name


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("what", ["chat template", "special tokens"])
def test_conversations_in_another_form_are_refused(
    made: tuple[Artifact, Artifact], tmp_path: Path, stage: str, what: str
) -> None:
    """The same tokenizer.json, so the same ids; but the model would be asked as it never learnt."""

    def body(work: Workspace) -> None:
        for file in payload(made[1]):
            (work.path / file).write_bytes((made[1].path / file).read_bytes())
        template, config = work.path / "chat_template.jinja", work.path / "tokenizer_config.json"
        if what == "chat template":
            template.write_text(template.read_text() + "{# another #}")
        else:
            named = json.loads(config.read_bytes())
            config.write_text(json.dumps(named | {"eos_token": named["pad_token"]}))

    other = sign(tmp_path / "other", "model", body)
    values = {"out": str(tmp_path / "out"), "shards": made[0].url, "model": other.url, "loop": LOOP}
    with pytest.raises(UserError, match=rf"written with another {what} \(.*; tokenize the data with"):
        if stage == "sft":
            sft.run(build(SftRecipe, values, "sft"))
        else:
            dpo.run(build(DpoRecipe, values, "dpo"))
    assert not (tmp_path / "out").exists()


def test_what_dpo_cannot_use_is_a_sentence(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must not see each other; leave out document_mask: false"):
        preferred(tmp_path / "a", made, loop=LOOP | {"document_mask": False})
    with pytest.raises(UserError, match=r"mixture: no token set 'chats'; did you mean 'chat'"):
        preferred(tmp_path / "b", made, mixture={"chats": 1.0})
    with pytest.raises(UserError, match=r"none of \d+ samples fits into a row of 16 tokens; raise"):
        preferred(tmp_path / "c", made, loop=LOOP | {"context": 16})

    def body(work: Workspace) -> None:
        work.write_jsonl("documents/train.jsonl", [{"text": PROSE[0]}])

    data = sign(tmp_path / "data", "data", body)
    bare = shards.run(TokenizeRecipe(out=str(tmp_path / "shards"), data=data.url, tokenizer=made[1].url))
    with pytest.raises(UserError, match=r"shards: holds no preferences; give the data stage records with"):
        preferred(tmp_path / "d", (bare, made[1]))


@pytest.mark.parametrize("student", ["scratch", "model", "lora"])
def test_distil_leaves_a_student(made: tuple[Artifact, Artifact], tmp_path: Path, student: str) -> None:
    fields: dict[str, Any] = {"model": made[1].url, "alpha": 0.9, "temperature": 2.0}
    if student == "scratch":
        fields = {"architecture": SMALLER, "mixture": {"documents": 0.5, "chat": 0.5}}
    if student == "lora":
        fields["lora"] = {"rank": 2}
    found = taught(tmp_path / "out", made, **fields)
    assert found.kind == ("adapter" if student == "lora" else "model")
    assert set(found.manifest["inputs"]) == {"teacher", "shards"} | (
        {"model"} if "model" in fields else set()
    )
    rows = read_metrics(found.path / "logs/metrics.jsonl")
    assert {"ce", "kl", "agreement", "validation_kl"} <= rows[-1].keys()
    if student == "scratch":
        assert rows[-1]["validation_kl"] < rows[0]["validation_kl"]
        assert directory.read_config(found.path).num_hidden_layers == 1
        assert rows[0]["bits_per_byte"] > rows[-1]["bits_per_byte"] > 0
    else:
        assert rows[0]["validation_kl"] == pytest.approx(0, abs=1e-6)  # the teacher is where it starts
        assert rows[0]["validation_agreement"] == 1.0


def test_what_distil_cannot_use_is_a_sentence(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    for fields in ({}, {"architecture": SHAPE, "model": made[1].url}):
        with pytest.raises(UserError, match=r"takes one student: give architecture .* or model"):
            taught(tmp_path / "a", made, **fields)
    with pytest.raises(UserError, match="lora is for a model that is there"):
        taught(tmp_path / "b", made, architecture=SHAPE, lora={"rank": 2})
    data = write_data(tmp_path / "data")
    tokenizer = write_tokenizer(tmp_path / "tokenizer", data, vocab_size=300)
    other = shards.run(TokenizeRecipe(out=str(tmp_path / "shards"), data=data.url, tokenizer=tokenizer.url))
    with pytest.raises(UserError, match=r"model: the teacher has another tokenizer than .*distil_endpoint"):
        taught(tmp_path / "c", (other, made[1]), architecture=SHAPE)
    short = SHAPE | {"max_positions": CONTEXT}
    values = {"shards": made[0].url, "architecture": short, "loop": LOOP | {"context": CONTEXT}}
    teacher = pretrain.run(build(PretrainRecipe, {"out": str(tmp_path / "short"), **values}, "pretrain"))
    with pytest.raises(UserError, match=rf"the teacher reads {CONTEXT} tokens, loop.context is {LONG}"):
        taught(tmp_path / "d", (made[0], teacher), architecture=SHAPE)


def write_recipe(file: Path, made: tuple[Artifact, Artifact], out: Path) -> Path:
    """Both stages, long enough to be killed in."""
    loop = LOOP | {"tokens": 60 * 4 * LONG, "checkpoint_steps": 5, "keep_best": True}
    common = {"shards": made[0].url, "loop": loop}
    stages = [
        {"stage": "dpo", "model": made[1].url, **common},
        {"stage": "distil", "teacher": "dpo", "architecture": SMALLER, **common},
    ]
    file.write_text(json.dumps({"output": str(out), "parallel": ONE, "stages": stages}))
    return file


def test_plan_and_overfit_know_them(
    made: tuple[Artifact, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first stage is run; then one batch of pairs is learnt by heart."""
    recipe = write_recipe(tmp_path / "r.json", made, tmp_path / "out")
    for words in (
        ["plan", str(recipe), "--json"],
        ["train", "overfit", str(recipe), "--steps", "60", "--json"],
    ):
        with pytest.raises(SystemExit) as e:
            main(words)
        assert not e.value.code
    plans, learnt = map(json.loads, capsys.readouterr().out.splitlines())
    first, second = plans["plans"]
    assert first["lengths"]["chat"]["samples"] == 8 and first["too_long"] == "drop"
    assert first["memory"]["teacher"] == 0 < second["memory"]["teacher"]
    assert learnt["ok"] and learnt["first"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("stage", ["dpo", "distil"])
def test_overfit_asks_for_what_can_be_learnt(
    made: tuple[Artifact, Artifact], tmp_path: Path, stage: str
) -> None:
    """Smoothed labels and a teacher's distribution leave a loss that no weights take away."""
    values = {"out": str(tmp_path), "shards": made[0].url, "loop": LOOP, "parallel": ONE}
    recipe: Trainable = build(DpoRecipe, values | {"model": made[1].url, "label_smoothing": 0.3}, "dpo")
    if stage == "distil":
        fields = {"teacher": made[1].url, "architecture": SHAPE, "alpha": 0.9}
        recipe = build(DistilRecipe, values | fields, "distil")
    assert overfit(recipe, steps=100).ok


@pytest.mark.slow
def test_killed_equals_undisturbed(made: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    """kill -9 after a checkpoint of each stage; DPO's reference is not computed again."""
    found, env = {}, runtime.child_env({"OMP_NUM_THREADS": "1"})
    for name in ("whole", "cut"):
        recipe = write_recipe(tmp_path / f"{name}.json", made, tmp_path / name)
        command = [sys.executable, "-m", "microlm", "run", str(recipe)]
        for stage in ("dpo", "distil") if name == "cut" else ():
            resume = tmp_path / "cut" / f"{stage}.tmp/resume"
            process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
            while not list(resume.glob("step-????????")):
                assert process.poll() is None
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert not (tmp_path / "cut" / stage).exists()
            assert (resume / "reference.safetensors").exists() == (stage == "dpo")
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("dpo: reference" in done.stderr) == (name == "whole")
        places = [tmp_path / name / stage for stage in ("dpo", "distil")]
        found[name] = [
            {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*.safetensors")}
            for place in places
        ]
        rows = [read_metrics(place / "logs/metrics.jsonl") for place in places]
        found[name].append([[r.get("loss") for r in some] for some in rows])
    assert found["cut"] == found["whole"]
    assert len(found["whole"][0]) == 2
