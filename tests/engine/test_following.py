"""An engine that follows weights under training: refreshed, it is the engine that is built from them anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_model import write_model

from microlm.core.records import Sampling
from microlm.engine import Engine
from microlm.model import directory, lora
from microlm.model.transformer import Decoder

ASKED = [Sampling(max_tokens=40), Sampling(max_tokens=40, temperature=1.0, seed=3, logprobs=0, n=3)]
PROMPTS = [list(range(5, 30)), list(range(40, 47))]


def answers(engine: Engine) -> list[tuple[tuple[int, ...], object]]:
    """Ids and log-probabilities of greedy and sampled answers; many at once, few at once."""
    alone = [c for s in ASKED for p in PROMPTS for c in engine.generate([p], s)]
    together = [c for s in ASKED for c in engine.generate(PROMPTS * 10, s)]
    return [(c.token_ids, c.logprobs) for c in (*alone, *together)]


def train(decoder: Decoder, seed: int) -> None:
    """A step of an optimizer that holds the weights' memory."""
    generator = torch.Generator().manual_seed(seed)
    weights = [p for p in decoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.02)
    for p in weights:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"quantize": "int8"},
        {"dtype": "bfloat16", "quantize": "int4"},
    ],
)
def test_a_refreshed_engine_equals_one_of_the_saved_weights(
    tmp_path: Path, kind: str, options: dict[str, str]
) -> None:
    live = directory.load(write_model(tmp_path / "start", kind))  # type: ignore[arg-type]
    engine = Engine(tmp_path / "start", decoder=live, **options)  # type: ignore[arg-type]
    before = answers(engine)
    for step in range(2):
        train(live, step)
        engine.refresh()
    directory.save(live, tmp_path / "after")
    (tmp_path / "after/tokenizer.json").write_bytes((tmp_path / "start/tokenizer.json").read_bytes())
    fresh = Engine(tmp_path / "after", **options)  # type: ignore[arg-type]
    assert answers(engine) == answers(fresh) != before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_under_training_is_folded_in(tmp_path: Path, dtype: str) -> None:
    live = directory.load(write_model(tmp_path / "start", "qwen3"))
    lora.apply(live, lora.LoraConfig(4, 8.0), torch.Generator().manual_seed(0))
    engine = Engine(tmp_path / "start", decoder=live, dtype=dtype)  # type: ignore[arg-type]
    assert engine._runner.native is not None
    assert answers(engine) == answers(Engine(tmp_path / "start", dtype=dtype))  # type: ignore[arg-type]
    train(live, 0)
    engine.refresh()
    lora.merge(live)
    merged = Engine(tmp_path / "start", decoder=live, dtype=dtype)  # type: ignore[arg-type]
    assert answers(engine) == answers(merged)


def test_a_copy_leaves_its_source_alone_and_draws_nothing_random(tmp_path: Path) -> None:
    live = directory.load(write_model(tmp_path / "start", "qwen3"), torch.bfloat16)
    places, random = [p.data_ptr() for p in live.parameters()], torch.get_rng_state()
    engine = Engine(tmp_path / "start", decoder=live, dtype="bfloat16")
    engine.generate(PROMPTS, ASKED[0])
    engine.refresh()
    assert [p.data_ptr() for p in live.parameters()] == places
    assert all(p.dtype == torch.float32 and p.requires_grad for p in live.parameters())
    assert torch.equal(torch.get_rng_state(), random)
