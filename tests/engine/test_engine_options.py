"""Drafts change only the number of steps; adapters at run time = merged; batch-invariant = bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_model import write_model

from microlm.core.errors import UserError
from microlm.core.records import Completion, Constraint, Sampling
from microlm.engine import Engine
from microlm.engine.forward import packed
from microlm.engine.forward.batch import Span, batch_of
from microlm.engine.speculate import Lookup
from microlm.model import directory, lora

GREEDY = Sampling(max_tokens=60, ignore_eos=True)
DRAWN = Sampling(max_tokens=60, temperature=0.8, top_p=0.95, seed=3, ignore_eos=True)
WINDOW = 512


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 directory with a window of 512."""
    return write_model(tmp_path_factory.mktemp("long"), "qwen3", seed=1, window=WINDOW)


def ids(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 320) for _ in range(count)]


def answers(engine: Engine, prompts: list[list[int]], sampling: Sampling, **options: str) -> list[Completion]:
    done = engine.generate(prompts, sampling, **options)  # type: ignore[arg-type]
    return [replace(c, cached_tokens=0) for c in done]


def count_steps(engine: Engine) -> list[int]:
    """Grows by the rows of each step."""
    rows: list[int] = []
    engine.on_step = lambda work: rows.append(sum(w.size + len(w.draft) for w in work))
    return rows


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        DRAWN,
        replace(DRAWN, repetition_penalty=1.2, logprobs=2),
        replace(GREEDY, stop=("o",), ignore_eos=False),
        replace(DRAWN, constraint=Constraint("json_schema", '{"type":"array","items":{"type":"integer"}}')),
    ],
)
def test_speculative_equals_not(long_model: Path, sampling: Sampling, native: bool) -> None:
    base = ids(12)
    prompts = [base * 6, ids(40, 1), [5, 6, 7] * 10, [9] * 30]
    plain = answers(Engine(long_model, max_seqs=4, native=native), prompts, sampling)
    drafting = Engine(long_model, max_seqs=4, native=native, speculate=7)
    for got in (answers(drafting, prompts, sampling), [answers(drafting, [p], sampling)[0] for p in prompts]):
        for mine, theirs in zip(got, plain, strict=True):
            assert replace(mine, logprobs=None) == replace(theirs, logprobs=None)
            for a, b in zip(mine.logprobs or (), theirs.logprobs or (), strict=True):
                assert a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_drafts_save_steps_where_the_answer_repeats(long_model: Path) -> None:
    decoder = directory.load(long_model)
    with torch.no_grad():  # a model that says what follows its last token in a circle
        for block in decoder.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    plain, drafting = (Engine(long_model, decoder=decoder, max_seqs=1, speculate=n) for n in (0, 7))
    sampling = replace(GREEDY, max_tokens=200)
    rows = count_steps(drafting)
    assert answers(drafting, [[30]], sampling) == answers(plain, [[30]], sampling)
    assert len(rows) < 100


def test_drafting_rests_where_it_does_not_pay() -> None:
    rng, lookup = random.Random(1), Lookup([1, 2, 3] * 20, 7, 0.4)
    output: list[int] = []
    drafted = 0
    for _ in range(300):  # the first of three tokens cannot be foretold
        draft = lookup.draft(output, 100)
        if draft:
            drafted += 1
            lookup.learn(len(draft), 0)
        output += [rng.choice((1, 2, 3)), 2, 3]
    assert 3 < drafted < 30


def test_a_draft_is_as_long_as_it_pays() -> None:
    def length_after(taken: int, price: float) -> int:
        lookup = Lookup([1, 2, 3] * 20, 7, price)
        for _ in range(10):
            if drafted := len(lookup.draft([], 100)):
                lookup.learn(drafted, min(taken, drafted))
        return len(lookup.draft([], 100))

    assert [length_after(7, price) for price in (0.05, 0.4, 2.0)] == [7, 7, 0]
    assert 1 <= length_after(1, 0.05) < 7 and length_after(0, 0.4) == 0


def test_a_draft_is_what_followed_the_longest_and_latest_match() -> None:
    lookup = Lookup([1, 2, 3, 4, 9, 2, 3, 5, 7, 1, 2, 3], 4, 0.1)
    assert lookup.draft([], 10) == (4, 9, 2, 3)
    assert lookup.draft([], 2) == (4, 9) and lookup.draft([], 0) == ()
    assert lookup.draft([8, 2, 3], 10) == (8, 2, 3, 8)  # of 2, 3 the latest, and so on
    assert lookup.draft([8, 2, 3, 6, 6], 10) == ()


@pytest.fixture(scope="module", params=["qwen3", "qwen2"])
def adapted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Path]]:
    """A model, and the same with each of two adapters merged beside the adapters."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_model(folder / "base", request.param, window=WINDOW)
    for seed, targets in ((1, "all-linear"), (2, ("q_proj", "down_proj"))):
        decoder = directory.load(base)
        generator = torch.Generator().manual_seed(seed)
        config = lora.LoraConfig(4, 8.0, targets, rslora=seed == 2)  # type: ignore[arg-type]
        lora.apply(decoder, config, generator)
        with torch.no_grad():
            for m in lora.adapted(decoder).values():
                m.lora_B.normal_(0, 0.2, generator=generator)
        lora.save_adapter(decoder, folder / f"adapter{seed}", "base", "")
        lora.merge(decoder)
        directory.save(decoder, folder / f"merged{seed}")
        for name in ("tokenizer.json",):
            (folder / f"merged{seed}" / name).write_bytes((base / name).read_bytes())
    return folder, [folder / "adapter1", folder / "adapter2"]


def test_lora_at_run_time_equals_merged(
    adapted: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, adapters = adapted
    engine = Engine(folder / "base", max_seqs=8)
    for i, path in enumerate(adapters, 1):
        engine.load_adapter(f"a{i}", path)
    assert engine.adapters == ["a1", "a2"]
    prompts = [ids(70), ids(5, 1)]
    expected = {
        None: answers(Engine(folder / "base"), prompts, GREEDY),
        "a1": answers(Engine(folder / "merged1"), prompts, GREEDY),
        "a2": answers(Engine(folder / "merged2"), prompts, GREEDY),
    }
    assert len({c[0].token_ids for c in expected.values()}) == 3
    requests = [(name, engine.add(p, GREEDY, adapter=name)) for name in expected for p in prompts]
    while engine.busy:  # all of them in one batch
        engine.step()
    got = [engine.completion(r).token_ids for _, r in requests]
    assert got == [c.token_ids for name in expected for c in expected[name]]
    for name in ("a2", "a1"):  # the pages of a prompt are those of its adapter
        again = engine.generate(prompts, GREEDY, adapter=name)
        assert [c.token_ids for c in again] == [c.token_ids for c in expected[name]]
        assert [c.cached_tokens for c in again] == [64, 0]


def test_lora_logits_equal_merged(adapted: tuple[Path, list[Path]]) -> None:
    folder, adapters = adapted
    engine, merged = Engine(folder / "base"), Engine(folder / "merged1")
    engine.load_adapter("a", adapters[0])
    asked = replace(GREEDY, prompt_logprobs=0, max_tokens=1)
    got = engine.generate([ids(90)], asked, adapter="a")[0].prompt_logprobs
    expected = merged.generate([ids(90)], asked)[0].prompt_logprobs
    pairs = zip((got or ())[1:], (expected or ())[1:], strict=True)
    assert max(abs(a.logprob - b.logprob) for a, b in pairs if a and b) <= 1e-4


def test_adapters_come_and_go(adapted: tuple[Path, list[Path]], tmp_path: Path) -> None:
    folder, (first, second) = adapted
    engine = Engine(folder / "base")
    engine.load_adapter("a", first)
    one = answers(engine, [ids(70)], GREEDY, adapter="a")
    running = engine.add(ids(70), GREEDY, adapter="a")
    engine.step()
    engine.unload_adapter("a")
    engine.load_adapter("a", second)
    while engine.busy:
        engine.step()
    assert engine.completion(running).token_ids == one[0].token_ids
    other = answers(engine, [ids(70)], GREEDY, adapter="a")
    assert other != one  # nothing of the old one is found in the cache
    with pytest.raises(UserError, match=r"'b' is not loaded \(loaded: a\)"):
        engine.add(ids(3), GREEDY, adapter="b")
    with pytest.raises(UserError, match="'a' is loaded already"):
        engine.load_adapter("a", first)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        engine.load_adapter("c", tmp_path)


def test_an_adapter_whose_base_cannot_be_checked_is_told(
    adapted: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """The served folder has no manifest; of an adapter that names no base there is nothing to tell."""
    folder, adapters = adapted
    shutil.copytree(adapters[0], tmp_path / "a")
    config = tmp_path / "a/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_bytes()) | {"microlm_base_digest": "c" * 64}))
    engine = Engine(folder / "base")
    with pytest.warns(UserWarning, match=r"a: was made for model c{12}…; whether .*/base is that one cannot"):
        engine.load_adapter("a", tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.load_adapter("b", adapters[1])
    assert engine.adapters == ["a", "b"]


@pytest.mark.parametrize("native", [True, False])
def test_batch_invariant_is_bit_for_bit(adapted: tuple[Path, list[Path]], native: bool) -> None:
    folder, adapters = adapted
    sampling = replace(DRAWN, max_tokens=8, logprobs=1, prompt_logprobs=0)
    prompts = [ids(n, n) for n in (3, 40, 70)]

    def make(**options: object) -> Engine:
        engine = Engine(folder / "base", batch_invariant=True, native=native, **options)  # type: ignore[arg-type]
        engine.load_adapter("a", adapters[0])
        return engine

    alone = [answers(make(max_seqs=1), [p], sampling)[0] for p in prompts]
    for options in ({}, {"max_prefill_tokens": 9}, {"speculate": 5}, {"kv_memory": 2**17}):
        engine = make(**options)
        others = [engine.add(ids(20, i), GREEDY, adapter="a" if i % 2 else None) for i in range(3)]
        assert answers(engine, prompts, sampling) == alone
        for request in others:
            engine.cancel(request)
    free = make().logprobs(prompts)
    expected = [[t.logprob for t in c.prompt_logprobs or () if t] for c in alone]
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(free, expected, strict=True))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("native", [True, False])
def test_a_quantized_cache_in_pieces_equals_whole(long_model: Path, kind: str, native: bool) -> None:
    prompts = [ids(n, n) for n in (3, 40, 100)]

    def make(**options: object) -> Engine:
        return Engine(long_model, native=native, kv_dtype=kind, **options)  # type: ignore[arg-type]

    alone = [answers(make(max_seqs=1), [p], GREEDY)[0] for p in prompts]
    for options in ({}, {"max_prefill_tokens": 11}, {"kv_memory": 2**17, "prefix_caching": False}):
        assert answers(make(**options), prompts, GREEDY) == alone
    exact, rounded = Engine(long_model), make()
    assert rounded.cache_bytes < exact.cache_bytes * (0.36 if kind == "int8" else 0.26)
    for a, b in zip(exact.logprobs(prompts), rounded.logprobs(prompts), strict=True):
        worst = max(abs(x - y) for x, y in zip(a, b, strict=True))
        assert 0 < worst < (0.1 if kind == "int8" else 1.0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_serve(long_model: Path, kind: str) -> None:
    prompts = [ids(n, n) for n in (3, 40, 100)]
    exact, rounded = Engine(long_model), Engine(long_model, quantize=kind)  # type: ignore[arg-type]
    for a, b in zip(exact.logprobs(prompts), rounded.logprobs(prompts), strict=True):
        assert 0 < max(abs(x - y) for x, y in zip(a, b, strict=True)) < (0.2 if kind == "int8" else 2.0)
    assert len(rounded.generate(prompts, GREEDY)[2].token_ids) == 60


@pytest.mark.parametrize("native", [True, False])
def test_changed_weights_are_taken_over(long_model: Path, native: bool) -> None:
    decoder = directory.load(long_model)
    places = [p.data_ptr() for p in decoder.parameters()]
    engine = Engine(long_model, decoder=decoder, native=native)
    old = answers(engine, [ids(70)], GREEDY)
    assert [p.data_ptr() for p in decoder.parameters()] == places  # an optimizer may hold this memory
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(1.3)
    running = engine.add(ids(3), GREEDY)
    with pytest.raises(UserError, match="refresh: requests wait or run"):
        engine.refresh()
    engine.cancel(running)
    engine.refresh()
    new = engine.generate([ids(70)], GREEDY)
    assert new == Engine(long_model, decoder=decoder, native=False).generate([ids(70)], GREEDY) != old


def test_scores_of_prompts_are_bounded_in_each_step(long_model: Path) -> None:
    prompts = [ids(70, n) for n in range(4)]
    asked = replace(GREEDY, prompt_logprobs=0, max_tokens=1)
    engine, whole = Engine(long_model), Engine(long_model)
    engine._scheduler.limits = replace(engine._scheduler.limits, scored=50)
    steps: list[int] = []
    engine.on_step = lambda work: steps.append(sum(w.size for w in work))
    got, expected = engine.generate(prompts, asked), whole.generate(prompts, asked)
    assert max(steps) <= 50 + len(prompts)  # each comes forward by one token at least
    for a, b in zip(got, expected, strict=True):
        pairs = zip((a.prompt_logprobs or ())[1:], (b.prompt_logprobs or ())[1:], strict=True)
        assert len(a.prompt_logprobs or ()) == 70
        assert max(abs(x.logprob - y.logprob) for x, y in pairs if x and y) <= 1e-4


@pytest.mark.parametrize("kind", ["auto", "int4"])
def test_the_step_that_cuda_graphs_capture_equals_the_eager_one(long_model: Path, kind: str) -> None:
    engine = Engine(long_model, native=False, kv_dtype=kind)  # type: ignore[arg-type]
    path, pool = engine._runner.torch, engine._scheduler.pool
    tables = [np.array([*(pool.take(4) or ()), 0, 0, 0, 0], dtype=np.int32) for _ in range(3)]
    prompts = [ids(n, n) for n in (3, 40, 100)]
    with torch.inference_mode():
        path.forward(batch_of([Span(p, 0, t, 1) for p, t in zip(prompts, tables, strict=True)]))
        rows = [Span([7 + i], len(p), t, 1) for i, (p, t) in enumerate(zip(prompts, tables, strict=True))]
        eager = path.forward(batch_of(rows))
        tokens = torch.tensor([7, 8, 9, 0])  # and a row of padding
        positions = torch.tensor([*map(len, prompts), 0])
        padded = torch.from_numpy(np.stack([*tables, np.zeros(8, dtype=np.int32)]))
        hidden = path.run(tokens, positions, path.rows_plan(positions, padded))
        assert torch.allclose(path.decoder.logits(hidden)[:3], eager, atol=1e-5)


def test_packed_matrices_compute_the_same(long_model: Path) -> None:
    decoder = directory.load(long_model, torch.bfloat16).to(torch.bfloat16)
    if not packed.can_pack(decoder):  # oneDNN has no bf16 on this processor: nothing is packed
        return
    x = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        for linear in (decoder.lm_head, decoder.model.layers[0].mlp.up_proj):
            assert torch.allclose(packed.PackedLinear(linear)(x), linear(x), rtol=2**-7, atol=2**-7)
    prompts = [ids(n, n) for n in (3, 40, 100)]
    asked = replace(GREEDY, prompt_logprobs=0, max_tokens=1)
    plain, quick = (Engine(long_model, dtype="bfloat16", max_seqs=n, native=False) for n in (8, 16))
    assert isinstance(quick._decoder.lm_head, packed.PackedLinear)
    assert not isinstance(plain._decoder.lm_head, packed.PackedLinear)
    for a, b in zip(plain.generate(prompts, asked), quick.generate(prompts, asked), strict=True):
        pairs = zip((a.prompt_logprobs or ())[1:], (b.prompt_logprobs or ())[1:], strict=True)
        assert all(x and y and abs(x.logprob - y.logprob) < 0.1 for x, y in pairs)


def test_embeddings_are_pooled_hidden_states(long_model: Path) -> None:
    engine, decoder = Engine(long_model), directory.load(long_model)
    texts = ["李白是诗人", "hello world, hello", "a"]
    hidden = []
    with torch.no_grad():
        for text in texts:
            tokens = torch.tensor([engine.tokenizer.encode(text)])
            from microlm.model.transformer import causal_attend

            hidden.append(decoder.hidden(tokens, torch.arange(tokens.shape[1]), causal_attend)[0])
    for pooling, expected in (
        ("mean", torch.stack([h.mean(0) for h in hidden])),
        ("last", torch.stack([h[-1] for h in hidden])),
    ):
        plain = torch.from_numpy(engine.embed(texts, pooling, normalize=False))  # type: ignore[arg-type]
        assert torch.allclose(plain, expected, atol=1e-5)
        unit = torch.from_numpy(engine.embed(texts, pooling))  # type: ignore[arg-type]
        assert torch.allclose(unit, expected / expected.norm(dim=-1, keepdim=True), atol=1e-5)
    with pytest.raises(UserError, match="pooling: 'max'"):
        engine.embed(texts, "max")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="text 2 of 2: prompt: is empty"):
        engine.embed(["a", ""])
    with pytest.raises(UserError, match="surrogate"):
        engine.embed(["a\ud800"])
    with pytest.raises(UserError, match="sequence 0: 513 tokens"):
        engine.embed([[5] * 513])
