"""On CUDA: the same answers as on the CPU, by graphs as without, in any company."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_model import write_model

from microlm.core.errors import UserError
from microlm.core.records import Completion, Constraint, Sampling
from microlm.engine import Engine
from microlm.model import directory, lora

pytestmark = pytest.mark.gpu
GREEDY = Sampling(max_tokens=60, ignore_eos=True)
DRAWN = Sampling(max_tokens=60, temperature=0.9, top_p=0.95, seed=3, ignore_eos=True)


def ids(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 320) for _ in range(count)]


PROMPTS = [ids(n, n) for n in (1, 3, 40, 70, 200)]


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), request.param, window=512)


@pytest.fixture
def make(model: Path) -> Callable[..., Engine]:
    return lambda **options: Engine(model, **({"max_seqs": 8} | options))


def on_cpu(model: Path) -> Engine:
    return Engine(model, decoder=directory.load(model), max_seqs=8, native=False)


def answers(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
    return [replace(c, cached_tokens=0) for c in engine.generate(prompts, sampling)]


def test_cuda_equals_the_cpu(model: Path, make: Callable[..., Engine]) -> None:
    assert answers(make(), PROMPTS, GREEDY) == answers(on_cpu(model), PROMPTS, GREEDY)
    asked = replace(GREEDY, prompt_logprobs=0, max_tokens=1)
    pairs = zip(make().generate(PROMPTS, asked), on_cpu(model).generate(PROMPTS, asked), strict=True)
    for mine, theirs in pairs:
        both = zip((mine.prompt_logprobs or ())[1:], (theirs.prompt_logprobs or ())[1:], strict=True)
        assert all(a and b and abs(a.logprob - b.logprob) <= 1e-4 for a, b in both)


def test_alone_equals_batched_chunked_preempted_and_drafted(make: Callable[..., Engine]) -> None:
    schema = Constraint("json_schema", '{"type":"array","items":{"type":"integer"}}')
    for sampling in (GREEDY, DRAWN, replace(DRAWN, constraint=schema)):
        alone = [answers(make(max_seqs=1), [p], sampling)[0] for p in PROMPTS]
        for options in ({}, {"max_prefill_tokens": 33}, {"kv_memory": 2**18}, {"speculate": 7}):
            assert answers(make(**options), PROMPTS, sampling) == alone


def test_a_graph_equals_the_step_that_it_captured(make: Callable[..., Engine]) -> None:
    graphs, eager = make(), make()
    eager._runner._graphs = None
    assert answers(graphs, PROMPTS, GREEDY) == answers(eager, PROMPTS, GREEDY)
    assert graphs._runner._graphs is not None and graphs._runner._graphs._graphs


def test_lora_at_run_time_equals_merged(model: Path, tmp_path: Path) -> None:
    decoder = directory.load(model)
    generator = torch.Generator().manual_seed(1)
    lora.apply(decoder, lora.LoraConfig(4, 8.0), generator)
    with torch.no_grad():
        for m in lora.adapted(decoder).values():
            m.lora_B.normal_(0, 0.2, generator=generator)
    lora.save_adapter(decoder, tmp_path / "adapter", "base", "")
    lora.merge(decoder)
    merged = Engine(model, decoder=decoder.cuda(), max_seqs=8)
    engine = Engine(model, max_seqs=8)
    engine.load_adapter("a", tmp_path / "adapter")
    got = engine.generate(PROMPTS, GREEDY, adapter="a")
    assert [c.token_ids for c in got] == [c.token_ids for c in merged.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_cache_gives_what_it_gives_on_the_cpu(model: Path, kind: str) -> None:
    there = Engine(model, kv_dtype=kind)  # type: ignore[arg-type]
    here = Engine(model, decoder=directory.load(model), kv_dtype=kind, native=False)  # type: ignore[arg-type]
    for a, b in zip(there.logprobs(PROMPTS[1:]), here.logprobs(PROMPTS[1:]), strict=True):
        assert a == pytest.approx(b, abs=0.02)  # a value on the edge of two codes may fall to either


def test_bfloat16_with_flash_attention_is_near_float32(make: Callable[..., Engine]) -> None:
    exact, short = make().logprobs(PROMPTS[1:]), replace(GREEDY, prompt_logprobs=0, max_tokens=5)
    found = make(dtype="bfloat16").generate(PROMPTS[1:], short)
    for a, b in zip(exact, found, strict=True):
        assert a == pytest.approx([t.logprob for t in b.prompt_logprobs or () if t], abs=0.5)


def test_batch_invariance_is_refused_by_a_sentence(make: Callable[..., Engine]) -> None:
    with pytest.raises(UserError, match="batch_invariant: is for the CPU"):
        make(batch_invariant=True)
