"""Small signed artifacts, built in code: data, tokenizer, model. For tests of stages that read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from microlm.core.artifact import Artifact, Kind, Workspace, stage
from microlm.core.recipe import StageRecipe, artifact_input
from microlm.model import directory
from microlm.model.config import ModelConfig, ModelType
from microlm.model.transformer import Decoder
from microlm.text.tokenizer import copy_files
from microlm.text.vocab import stage as train_tokenizer

PROSE = (
    "李白（701年—762年），字太白，是唐代的诗人，写了《静夜思》。",
    "杜甫生于712年，是唐代的诗人；他和李白是朋友。",
    "居里夫人出生于华沙，她是一位物理学家。",
    "Li Bai was a poet of the Tang dynasty, born in 701.",
    "Marie Curie was born in Warsaw; she was a physicist.",
)
TURNS = (
    ("李白是谁？", "李白是唐代的诗人。"),
    ("Who was Marie Curie?", "She was a physicist."),
    ("抽取为JSON：朝代\n文本：李白是唐代的诗人。", '{"李白":{"朝代":"唐代"}}'),
)


class Linked(StageRecipe):
    """A recipe with the input fields that the tests need."""

    model: str | None = artifact_input(None)
    predictions: str | None = artifact_input(None)
    data: str | None = artifact_input(None)
    source: str = "factbook"


def sign(out: Path, kind: Kind, body: Callable[[Workspace], None], **fields: Any) -> Artifact:
    """A finished artifact with the files that `body` writes."""
    run = stage(kind, kind, version=1)(lambda recipe, work: body(work))
    return run(Linked(out=str(out), **fields))


def write_data(out: Path, prose: Sequence[str] = PROSE, repeat: int = 20) -> Artifact:
    """A data artifact: each line `repeat` times for training, once held out."""
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in TURNS]
    record = {
        "id": "0", "cate": "人物", "text": PROSE[0], "allowed": ["朝代"],
        "relation": [{"head": "李白", "relation": "朝代", "tail": "唐代"}],
    }  # fmt: skip

    def body(work: Workspace) -> None:
        work.licences.add("CC0-1.0")
        for split, times in (("train", repeat), ("validation", 1)):
            work.write_jsonl(f"documents/{split}.jsonl", [{"text": t} for t in prose] * times)
            work.write_jsonl(f"conversations/{split}.jsonl", [{"messages": t} for t in talks] * times)
        work.write_jsonl("extraction/test.jsonl", [record])
        work.write_json("logs/audit.json", {"from_factbook": ["documents", "conversations"]})

    return sign(out, "data", body)


def write_tokenizer(out: Path, data: Artifact, **fields: Any) -> Artifact:
    """A tokenizer artifact trained on `data`."""
    defaults: dict[str, Any] = {"vocab_size": 400, "assistant_name": None}
    return train_tokenizer.run(
        train_tokenizer.TokenizerRecipe(out=str(out), data=str(data.path), **(defaults | fields))
    )


def tiny_config(kind: ModelType = "qwen3", vocab_size: int = 300, **fields: Any) -> ModelConfig:
    """2 layers, d 32, grouped heads."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "rope_theta": 10_000.0, "model_type": kind, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return ModelConfig(**(sizes | fields))


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder whose every weight matters: far from zero and from the identity."""
    decoder, generator = Decoder(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(decoder.named_parameters()):
            if weight.dim() == 2:
                weight.normal_(0.0, 0.2, generator=generator)
            else:
                weight.uniform_(0.5, 1.5, generator=generator)
    decoder.weights_from = "a test"
    return decoder


def write_model(out: Path, tokenizer: Artifact, data: Artifact, seed: int = 0, **fields: Any) -> Artifact:
    """A model artifact with random weights and the tokenizer's files."""

    def body(work: Workspace) -> None:
        size = tokenizer.manifest["metrics"]["vocab_size"]
        directory.save(random_decoder(tiny_config(vocab_size=size, **fields), seed), work.path)
        copy_files(tokenizer.path, work.path)

    return sign(out, "model", body, data=str(data.path), seed=seed)
