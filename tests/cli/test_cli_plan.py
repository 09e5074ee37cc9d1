"""Recipe + words → plan, as a pure function."""

import re
from pathlib import Path
from typing import Any

import pytest

from microlm.cli.pipeline import Planned, resolve, until
from microlm.cli.recipes import find_recipe
from microlm.cli.run import COMMANDS, _one_stage_help
from microlm.cli.stages import STAGES
from microlm.core.errors import UserError
from microlm.core.recipe import read_yaml

INPUTS = {
    "tokenizer": ("data",),
    "tokenize": ("data", "tokenizer"),
    "pretrain": ("shards",),
    "sft": ("model", "shards"),
}


def plan(data: dict[str, Any], *words: str) -> list[Planned]:
    return resolve(data, words, lambda stage: INPUTS.get(stage, ()), "r.yaml")


def pipeline(**top: Any) -> dict[str, Any]:
    stages = [
        {"stage": "data", "source": "factbook"},
        {"stage": "tokenizer", "name": "tok", "data": "data", "vocab_size": 300},
        {"stage": "tokenize", "name": "shards", "data": "data", "tokenizer": "tok", "seed": 9},
        {"stage": "pretrain", "shards": "shards", "loop": {"tokens": 5}, "parallel": {"threads": 3}},
        {"stage": "sft", "model": "pretrain", "shards": "shards"},
        {"stage": "sft", "name": "lora", "model": "sft", "shards": "/other/shards"},
    ]
    return {"name": "q", "output": "runs/q", "seed": 1, "parallel": {"processes": 2}, "stages": stages, **top}


def test_a_pipeline_is_resolved() -> None:
    found = plan(pipeline())
    assert [(p.name, p.stage, p.recipe) for p in found][:2] == [
        ("data", "data", STAGES["data"].split(":")[1]),
        ("tok", "tokenizer", "TokenizerRecipe"),
    ]
    both = {"processes": 2}
    assert found[0].fields == {"source": "factbook", "seed": 1, "parallel": both, "out": "runs/q/data"}
    assert found[2].fields == {
        "data": "runs/q/data", "tokenizer": "runs/q/tok", "seed": 9, "parallel": both, "out": "runs/q/shards",
    }  # fmt: skip
    assert found[3].fields["parallel"] == {"processes": 2, "threads": 3}
    assert found[5].fields["model"] == "runs/q/sft" and found[5].fields["shards"] == "/other/shards"


def test_the_best_checkpoint_of_an_earlier_stage_is_an_input() -> None:
    found = plan(pipeline(), "lora.model=sft/best", "sft.loop.keep_best=true")
    assert found[5].fields["model"] == "runs/q/sft/best"
    for word, sentence in [
        ("lora.model=sft/best", "stage 'sft' keeps no best; set sft.loop.keep_best=true"),
        ("lora.model=sft/bset", "stage 'sft' leaves no 'bset' to name"),
        ("sft.model=lora/best", "stage 'lora' does not run before this one"),
    ]:
        with pytest.raises(UserError, match=sentence):
            plan(pipeline(), word)


def test_overrides_reach_their_stage() -> None:
    found = {
        p.name: p.fields
        for p in plan(
            pipeline(), "output=s3://b/x", "seed=4", "parallel.processes=1", "pretrain.loop.tokens=1e6",
            "lora.seed=8", "data.source=jsonl:my.jsonl",
        )
    }  # fmt: skip
    assert found["data"] == {
        "source": "jsonl:my.jsonl", "seed": 4, "parallel": {"processes": 1}, "out": "s3://b/x/data",
    }  # fmt: skip
    assert found["pretrain"]["loop"] == {"tokens": 1e6}
    assert (found["lora"]["seed"], found["sft"]["seed"], found["shards"]["seed"]) == (8, 4, 9)


def test_the_recipe_is_not_changed() -> None:
    data = pipeline()
    plan(data, "pretrain.loop.tokens=7")
    assert data == pipeline()


def test_places() -> None:
    assert plan({"name": "x", "stages": [{"stage": "data"}]})[0].fields["out"] == "runs/x/data"
    assert plan({"stages": [{"stage": "data", "out": "/shared/data"}]})[0].fields["out"] == "/shared/data"
    data = pipeline()
    data["stages"][0]["out"] = "/shared/data"
    assert plan(data)[1].fields["data"] == "/shared/data"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"outptu": "x"}, "unknown key 'outptu' of a pipeline; did you mean 'output'?"),
        ({"stages": []}, "expected a list of stages"),
        ({"stages": {"data": {}}}, "expected a list of stages"),
        ({"stages": ["data"]}, "entry 1: expected '- stage: TYPE'"),
        ({"stages": [{"stage": "pretrian"}]}, "no stage type 'pretrian'; did you mean 'pretrain'?"),
        ({"stages": [{"stage": ["data"]}]}, "no stage type"),
        ({"stages": [{"name": "x"}]}, "key 'stage' is missing; stage types: data"),
        ({"stages": [{"stage": "data"}, {"stage": "data"}]}, "a second stage named 'data'"),
        ({"stages": [{"stage": "data", "name": "../x"}]}, "cannot be a stage's name"),
        ({"stages": [{"stage": "data", "name": "seed"}]}, "cannot be a stage's name"),
        ({"stages": [{"stage": "data", "name": 3}]}, "cannot be a stage's name"),
        ({"stages": [{"stage": "tokenizer", "data": "data"}]}, "no stage runs before this one"),
        ({"stages": [{"stage": "data"}, {"stage": "tokenizer", "data": "dta"}]}, "did you mean 'data'?"),
        ({"stages": [{"stage": "tokenizer", "data": "data"}, {"stage": "data"}]}, "move it up"),
        ({"output": 3}, "expected a directory"),
    ],
)
def test_mistakes_in_a_pipeline(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as e:
        plan(pipeline(**change))
    assert str(e.value).startswith("r.yaml: ") and told in str(e.value)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "prtrain.loop.tokens=1",
            "'prtrain' is neither a stage nor a top-level key; did you mean 'pretrain'?",
        ),
        ("ouput=x", "did you mean 'output'?"),
        ("tokenizer.vocab_size=3", "neither a stage"),
        ("stages=[]", "neither a stage nor a top-level key"),
        ("pretrain=3", "write pretrain.KEY=value"),
        ("pretrain.stage=sft", "edit r.yaml"),
        ("pretrain.shards.x=1", "is a value, not a block"),
        ("nonsense", "expected key=value"),
    ],
)
def test_mistakes_in_words(word: str, told: str) -> None:
    with pytest.raises(UserError) as e:
        plan(pipeline(), word)
    assert told in str(e.value)


def test_one_stage() -> None:
    data = {"stage": "pretrain", "out": "a", "shards": "b", "loop": {"tokens": 1}}
    found = plan(data, "loop.tokens=2", "output=c", "seed=3", "pretrain.loop.rows=4")
    assert found == [
        Planned("pretrain", "pretrain", "PretrainRecipe",
                {"out": "c", "shards": "b", "loop": {"tokens": 2, "rows": 4}, "seed": 3}),
    ]  # fmt: skip
    assert plan({**data, "name": "base"})[0].name == "base"
    with pytest.raises(UserError, match="'out' is missing"):
        plan({"stage": "data"})
    with pytest.raises(UserError, match="neither 'stages:'"):
        plan({"name": "x"})
    with pytest.raises(UserError, match="did you mean 'sft'"):
        plan({"stage": "sfft", "out": "x"})


def test_until_keeps_what_comes_before() -> None:
    found = plan(pipeline())
    assert [p.name for p in until(found, "pretrain", "r")] == ["data", "tok", "shards", "pretrain"]
    assert until(found, "sft", "r") == found
    with pytest.raises(UserError, match="holds no stage of type 'export'"):
        until(found, "export", "r")


def test_the_example_of_a_stage_command_is_a_recipe_that_has_the_stage() -> None:
    for words, (stage, text, example) in COMMANDS.items():
        if stage == "synth":
            continue  # an endpoint of one's own
        name = re.search(r"recipes/(\w+)\.yaml", _one_stage_help(words, stage, example))
        assert name and text
        held = read_yaml(find_recipe(Path(name[1])))["stages"]
        assert stage in [entry["stage"] for entry in held], words
