"""The stages `pretrain` and `sft` from shards to signed directories, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import sign, write_data, write_tokenizer
from training import CONTEXT

from microlm.core.artifact import Artifact, Workspace
from microlm.core.errors import UserError
from microlm.core.recipe import build
from microlm.model import directory, lora
from microlm.model.architecture import ArchitectureRecipe
from microlm.text import shards
from microlm.text.shards import TokenizeRecipe
from microlm.train import pretrain
from microlm.train.batches import IGNORE
from microlm.train.plan import plan
from microlm.train.pretrain import PretrainRecipe
from microlm.train.tuning import sft
from microlm.train.tuning.sft import SftRecipe

SHAPE = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "intermediate_size": 64}
LOOP = {
    "tokens": 6 * 4 * CONTEXT, "context": CONTEXT, "batch_rows": 4, "micro_rows": 2, "dtype": "float32",
    "compile": False, "validation_rows": 4,
}  # fmt: skip
ONE = {"processes": 1, "threads": 1}


def tokenize(out: Path, data: Artifact, tokenizer: Artifact) -> Artifact:
    return shards.run(TokenizeRecipe(out=str(out), data=data.url, tokenizer=tokenizer.url))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact, Artifact]:
    """Data, shards and a pretrained model."""
    folder = tmp_path_factory.mktemp("made")
    data = write_data(folder / "data")
    tokens = tokenize(folder / "shards", data, write_tokenizer(folder / "tokenizer", data))
    return data, tokens, pretrained(folder / "pretrain", tokens)


def pretrained(out: Path, tokens: Artifact, **fields: Any) -> Artifact:
    values = {"out": str(out), "shards": tokens.url, "architecture": SHAPE, "loop": LOOP, "parallel": ONE}
    return pretrain.run(build(PretrainRecipe, values | fields, "pretrain"))


def tuned(out: Path, tokens: Artifact, model: Artifact, **fields: Any) -> Artifact:
    values = {"out": str(out), "shards": tokens.url, "model": model.url, "loop": LOOP, "parallel": ONE}
    return sft.run(build(SftRecipe, values | fields, "sft"))


def payload(artifact: Artifact) -> list[str]:
    return [f["path"] for f in artifact.manifest["files"] if f["payload"]]


HF = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
TOKENIZER = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]


def test_pretrain_leaves_a_model(made: tuple[Artifact, Artifact, Artifact], tmp_path: Path) -> None:
    _, tokens, model = made
    assert payload(model) == [*HF, *TOKENIZER]
    assert (model.kind, model.manifest["licences"]) == ("model", ["CC0-1.0"])
    assert not (model.path / "resume").exists()
    config = directory.load(model.path).config
    index = tokens.json("index.json")
    assert config.vocab_size == 448 >= index["vocab_size"]
    assert (config.eos_token_id, config.pad_token_id) == (index["eos_token_id"], index["pad_token_id"])
    again = pretrained(tmp_path / "again", tokens)
    other = pretrained(tmp_path / "other", tokens, seed=1)
    assert again.digest == model.digest != other.digest
    assert (again.path / "model.safetensors").read_bytes() == (model.path / "model.safetensors").read_bytes()


def test_the_summary_is_in_the_manifest(made: tuple[Artifact, Artifact, Artifact]) -> None:
    metrics = made[2].manifest["metrics"]
    assert metrics["tokens"] == 6 * 4 * CONTEXT
    assert metrics["parameters"] == metrics["trained_parameters"]
    assert metrics["parameters"] == sum(p.numel() for p in directory.load(made[2].path).parameters())
    assert 0 < metrics["loss"] < 7
    assert 0 < metrics["validation_loss"] < 7
    assert 0 < metrics["bits_per_byte"] < metrics["validation_loss"] * 1.4427  # an id is a byte or more
    assert metrics["peak_rss_bytes"] > 1e7
    assert metrics["padding_share"] == 0.0
    assert metrics["epochs"]["documents"] > 0
    assert 0 <= metrics["data_wait_share"] <= 1
    assert metrics["tokens_per_s"] > 0
    for name in ("loss.html", "metrics.jsonl", "summary.json"):
        assert made[2].file(f"logs/{name}").is_file()


def test_sft_leaves_a_model_and_lora_an_adapter(
    made: tuple[Artifact, Artifact, Artifact], tmp_path: Path
) -> None:
    _, tokens, model = made
    full = tuned(tmp_path / "sft", tokens, model)
    assert (full.kind, payload(full)) == ("model", [*HF, *TOKENIZER])
    assert full.digest != model.digest
    adapter = tuned(tmp_path / "lora", tokens, full, lora={"rank": 4, "alpha": 8})
    files = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", *TOKENIZER]
    assert (adapter.kind, payload(adapter)) == ("adapter", files)
    decoder = directory.load(full.path)
    lora.load_adapter(decoder, adapter.path, base_digest=full.digest)
    assert any(float(m.lora_B.detach().abs().max()) > 0 for m in lora.adapted(decoder).values())
    metrics = adapter.manifest["metrics"]
    assert 0 < metrics["trained_parameters"] < metrics["parameters"]


def test_sft_may_mix_documents_in(made: tuple[Artifact, Artifact, Artifact], tmp_path: Path) -> None:
    _, tokens, model = made
    mixed = tuned(tmp_path / "mixed", tokens, model, mixture={"chat": 0.5, "documents": 0.5})
    assert set(mixed.manifest["metrics"]["lengths"]) == {"chat", "documents"}
    with pytest.raises(UserError, match=r"mixture: no token set 'chats'; did you mean 'chat'"):
        tuned(tmp_path / "typo", tokens, model, mixture={"chats": 1.0})


def test_what_is_too_long_is_told_by_the_plan_and_by_the_run(
    made: tuple[Artifact, Artifact, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a step, and in the manifest; nothing of it when every conversation fits."""
    _, tokens, model = made
    config, index = directory.read_config(model.path), tokens.json("index.json")
    told = {}
    for policy in ("drop", "cut_left", "split"):
        fields = {"too_long": policy, "loop": LOOP | {"context": 20}, "mixture": {"chat": 1.0}}
        cut = tuned(tmp_path / policy, tokens, model, **fields)
        found = told[policy] = cut.manifest["metrics"]["lengths"]["chat"]
        recipe = build(SftRecipe, {"out": "x", "shards": "y", "model": "z", **fields}, "sft")
        planned = plan(recipe, config, index, tokens.path, peak=False)
        assert planned.to_json()["lengths"] == {"chat": found}
        line = f"chat: {planned.lengths['chat'].sentence()}"
        assert f"sft: training: {line}\n" in capsys.readouterr().err
        assert f"samples     {line}" in list(planned.lines())
        assert cut.json("logs/lengths.json")["training"]["chat"] == found
        assert cut.manifest["metrics"]["shares"] == {"chat": 1.0}
    assert told["drop"]["longer"] == told["drop"]["dropped"] > 0 < told["drop"]["labels_lost"]
    assert told["cut_left"]["cut"] == told["drop"]["longer"] and told["cut_left"]["eos_cut"] == 0
    assert told["split"]["labels_lost"] == 0 < told["split"]["pieces"]


def test_another_tokenizer_is_a_sentence(made: tuple[Artifact, Artifact, Artifact], tmp_path: Path) -> None:
    data, _, model = made
    other = tokenize(tmp_path / "shards", data, write_tokenizer(tmp_path / "tokenizer", data, vocab_size=300))
    with pytest.raises(UserError, match=r"shards: was made with another tokenizer than that of .*pretrain"):
        tuned(tmp_path / "sft", other, model)


def test_data_without_validation_can_be_trained_on(
    made: tuple[Artifact, Artifact, Artifact], tmp_path: Path
) -> None:
    source = made[0]

    def body(work: Workspace) -> None:
        for kind in ("documents", "conversations"):
            work.write_text(f"{kind}/train.jsonl", source.file(f"{kind}/train.jsonl").read_text())
            work.write_text(f"{kind}/validation.jsonl", "")

    data = sign(tmp_path / "data", "data", body)
    tokens = tokenize(tmp_path / "shards", data, write_tokenizer(tmp_path / "tokenizer", data))
    model = pretrained(tmp_path / "pretrain", tokens)
    assert model.manifest["metrics"]["validation_loss"] is None
    assert tuned(tmp_path / "sft", tokens, model).manifest["metrics"]["validation_loss"] is None


def test_no_conversations_is_a_sentence(made: tuple[Artifact, Artifact, Artifact], tmp_path: Path) -> None:
    _, tokens, model = made

    def body(work: Workspace) -> None:
        work.write_text("documents/train.jsonl", '{"text": "a text"}\n')

    data = sign(tmp_path / "data", "data", body)
    bare = shards.run(
        TokenizeRecipe(
            out=str(tmp_path / "shards"), data=data.url, tokenizer=str(Path(tokens.url) / "../tokenizer")
        )
    )
    with pytest.raises(UserError, match=r"hold no token set of this kind"):
        tuned(tmp_path / "sft", bare, model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_shape_becomes_a_stock_configuration(kind: str, tied: bool) -> None:
    index = {"vocab_size": 129, "eos_token_id": 2, "pad_token_id": 0}
    config = ArchitectureRecipe(preset="4m", model_type=kind, tied=tied, layers=3).config(index)
    assert (config.model_type, config.tie_word_embeddings, config.num_hidden_layers) == (kind, tied, 3)
    assert config.vocab_size == 192


def test_a_shape_that_cannot_be_is_refused() -> None:
    for wrong in ({"heads": 3, "kv_heads": 2}, {"head_dim": 7}):
        with pytest.raises(UserError, match=r"heads must be a multiple of kv_heads, and head_dim even"):
            build(ArchitectureRecipe, {**SHAPE, **wrong}, "architecture")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            {"hidden_size": 1_000_000},
            "architecture: hidden_size: .*less than .* 16384 .found 1",
        ),
        ({"layers": 100_000}, "layers: .* 256"),
        ({"heads": 4096, "kv_heads": 4}, "heads: .* 256"),
        ({"head_dim": 65536}, "head_dim: .* 512"),
        ({"intermediate_size": 10_000_000}, "intermediate_size: .* 65536"),
        ({"max_positions": 1 << 40}, "max_positions: .* 1048576"),
        ({"rope_theta": 1e30}, "rope_theta: .* 1000000000"),
        ({"rope_theta": 0.1}, "rope_theta: .* greater than or equal to 1"),
        (
            {"hidden_size": 16_384, "intermediate_size": 65_536, "layers": 256},
            "a shape of 825.0 billion weights without the embedding, at most 8 billion are trained; lower",
        ),
    ],
)
def test_a_shape_beyond_all_bounds_is_refused(wrong: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        build(ArchitectureRecipe, {**SHAPE, **wrong}, "architecture")


def test_labels_of_padding_are_ignored_by_torch_too() -> None:
    loss = torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.tensor([1, IGNORE]), reduction="sum")
    assert float(loss) == pytest.approx(float(torch.tensor(3.0).log()))
