"""Pretraining that goes on from a model: the same weights, or a longer context with scaled rotary angles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import write_data, write_tokenizer
from training import CONTEXT
from transformers import AutoModelForCausalLM

from microlm.cli import main
from microlm.core.artifact import Artifact
from microlm.core.errors import UserError
from microlm.core.metrics import read_metrics
from microlm.core.recipe import build
from microlm.model import directory
from microlm.model.rope import RopeScaling
from microlm.text import shards
from microlm.text.shards import TokenizeRecipe
from microlm.train import pretrain
from microlm.train.pretrain import PretrainRecipe
from microlm.train.tuning import sft
from microlm.train.tuning.sft import SftRecipe

SHAPE = {
    "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 64,
    "max_positions": CONTEXT,
}  # fmt: skip
LOOP = {
    "tokens": 6 * 4 * CONTEXT, "context": CONTEXT, "batch_rows": 4, "micro_rows": 2, "dtype": "float32",
    "compile": False, "validation_rows": 4, "workers": 0,
}  # fmt: skip
LONG = 4 * CONTEXT


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("tokens")
    data = write_data(folder / "data")
    tokenizer = write_tokenizer(folder / "tokenizer", data)
    return shards.run(TokenizeRecipe(out=str(folder / "shards"), data=data.url, tokenizer=tokenizer.url))


@pytest.fixture(scope="module")
def base(tokens: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return pretrained(tmp_path_factory.mktemp("base") / "model", tokens, architecture=SHAPE)


def pretrained(out: Path, tokens: Artifact, loop: dict[str, Any] | None = None, **fields: Any) -> Artifact:
    one = {"processes": 1, "threads": 1}
    values = {"out": str(out), "shards": tokens.url, "loop": LOOP | (loop or {}), "parallel": one}
    return pretrain.run(build(PretrainRecipe, values | fields, "pretrain"))


def curve(model: Artifact) -> list[float]:
    rows = read_metrics(model.path / "logs/metrics.jsonl")
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


def test_it_begins_where_the_model_ended(tokens: Artifact, base: Artifact, tmp_path: Path) -> None:
    more = pretrained(tmp_path / "more", tokens, model=base.url)
    assert curve(more)[0] == pytest.approx(curve(base)[-1], rel=1e-6)
    assert directory.read_config(more.path) == directory.read_config(base.path)
    assert more.manifest["inputs"]["model"]["digest"] == base.digest != more.digest


def test_the_same_architecture_may_be_stated_again(tokens: Artifact, base: Artifact, tmp_path: Path) -> None:
    again = pretrained(tmp_path / "again", tokens, model=base.url, architecture=SHAPE)
    assert directory.read_config(again.path) == directory.read_config(base.path)
    with pytest.raises(UserError, match=r"architecture: num_hidden_layers is 3 here and 2 in .*model; leave"):
        pretrained(tmp_path / "other", tokens, model=base.url, architecture=SHAPE | {"layers": 3})


@pytest.mark.parametrize(
    ("extend", "scaling"),
    [
        ({}, RopeScaling("llama3", 4.0, 1.0, 4.0, CONTEXT)),
        ({"scaling": "linear"}, RopeScaling("linear", 4.0)),
        ({"scaling": "linear", "factor": 2.5}, RopeScaling("linear", 2.5)),
        ({"scaling": "none", "rope_theta": 5e4}, None),
        ({"trained_positions": 16}, RopeScaling("llama3", 8.0, 1.0, 4.0, 16)),
    ],
    ids=["llama3", "linear", "factor", "theta", "trained"],
)
def test_a_longer_context_is_trained_and_loads_everywhere(
    tokens: Artifact, base: Artifact, tmp_path: Path, extend: dict[str, Any], scaling: RopeScaling | None
) -> None:
    made = pretrained(
        tmp_path / "long", tokens, {"context": LONG, "batch_rows": 2, "micro_rows": 1}, model=base.url,
        extend={"max_positions": LONG, **extend},
    )  # fmt: skip
    config = directory.read_config(made.path)
    assert (config.max_position_embeddings, config.rope_scaling) == (LONG, scaling)
    assert config.rope_theta == extend.get("rope_theta", 1e4)
    theirs = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    ids = torch.randint(3, 300, (1, LONG), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (directory.load(made.path)(ids) - theirs(ids).logits).abs().max() <= 1e-4
    assert len(curve(made)) >= 2


def test_an_extended_model_can_be_extended_and_tuned(
    tokens: Artifact, base: Artifact, tmp_path: Path
) -> None:
    """The length that the model knows without scaling stays the first one."""
    once = pretrained(
        tmp_path / "once", tokens, {"context": 2 * CONTEXT, "micro_rows": 1}, model=base.url,
        extend={"max_positions": 2 * CONTEXT},
    )  # fmt: skip
    twice = pretrained(
        tmp_path / "twice", tokens, {"context": LONG, "micro_rows": 1}, model=once.url,
        extend={"max_positions": LONG},
    )  # fmt: skip
    found = directory.read_config(twice.path).rope_scaling
    assert found == RopeScaling("llama3", 4.0, 1.0, 4.0, CONTEXT)
    values = {
        "out": str(tmp_path / "sft"), "shards": tokens.url, "model": twice.url, "parallel": {"processes": 1},
        "loop": LOOP | {"context": LONG, "micro_rows": 1},
    }  # fmt: skip
    tuned = sft.run(build(SftRecipe, values, "sft"))
    assert directory.read_config(tuned.path) == directory.read_config(twice.path)


def test_mistakes_are_sentences(tokens: Artifact, base: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loop\.context 128 is longer than the model's 32 positions"):
        pretrained(tmp_path / "a", tokens, {"context": LONG}, model=base.url)
    with pytest.raises(UserError, match="states no model; give architecture"):
        pretrained(tmp_path / "b", tokens)
    with pytest.raises(UserError, match="extend is for a model that is there"):
        pretrained(tmp_path / "c", tokens, architecture=SHAPE, extend={"max_positions": LONG})
    with pytest.raises(UserError, match=r"extend\.scaling: input should be 'none', 'linear' or 'llama3'"):
        pretrained(tmp_path / "d", tokens, model=base.url, extend={"max_positions": LONG, "scaling": "yarn"})
    data = write_data(tmp_path / "data")
    other = write_tokenizer(tmp_path / "tokenizer", data, vocab_size=300)
    odd = shards.run(TokenizeRecipe(out=str(tmp_path / "odd"), data=data.url, tokenizer=other.url))
    with pytest.raises(UserError, match=r"odd: was made with another tokenizer than that of .*model"):
        pretrained(tmp_path / "e", odd, model=base.url)


def test_the_resolved_recipe_shows_the_presets_shape(tokens: Artifact, tmp_path: Path) -> None:
    tiny = {"preset": "4m", "layers": 1, "max_positions": 64}
    made = pretrained(tmp_path / "preset", tokens, {"tokens": 4 * CONTEXT}, architecture=tiny)
    stated = json.loads((made.path / "manifest.json").read_bytes())["recipe"]["architecture"]
    assert (stated["preset"], stated["layers"], stated["hidden_size"]) == ("4m", 1, 192)


def test_a_linear_scaling_grows_with_the_context(
    tokens: Artifact, base: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """32 positions are known: 64 need the factor 2, 128 after that 4; and the dry run says the same."""
    linear = {"scaling": "linear", "max_positions": 2 * CONTEXT}
    once = pretrained(
        tmp_path / "once", tokens, {"context": 2 * CONTEXT, "micro_rows": 1}, model=base.url, extend=linear
    )
    assert directory.read_config(once.path).rope_scaling == RopeScaling("linear", 2.0)
    further = {
        "stage": "pretrain", "shards": tokens.url, "parallel": {"processes": 1}, "model": once.url,
        "loop": LOOP | {"context": LONG, "micro_rows": 1}, "extend": linear | {"max_positions": LONG},
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(further | {"out": str(tmp_path / "twice")}))
    with pytest.raises(SystemExit):
        main(["plan", str(recipe), "--json"])
    (planned,) = json.loads(capsys.readouterr().out)["plans"]
    with pytest.raises(SystemExit):
        main(["pretrain", str(recipe)])
    found = directory.read_config(tmp_path / "twice").rope_scaling
    assert found == RopeScaling("linear", 4.0)
    assert RopeScaling(**planned["config"]["rope_scaling"]) == found
