"""Cached = full, ours = transformers, alone = in a batch, stream = whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import write_model

from microlm.core.records import Constraint, Message, Sampling
from microlm.engine import Engine
from microlm.model import directory

GREEDY = Sampling(max_tokens=60, ignore_eos=True)
PROMPTS = ["李白", "杜甫也是", "hello wor", "the poet wrote 12 poems 😀 and", "a", "诗人" * 9]


def full_greedy(path: Path, ids: list[int], new: int, vocab_size: int) -> list[int]:
    """Greedy decoding that recomputes everything for every token."""
    decoder, ids = directory.load(path), list(ids)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(decoder(torch.tensor([ids]))[0, -1, :vocab_size].argmax()))
    return ids[-new:]


def test_cached_decode_equals_full_forward(any_model: Path) -> None:
    engine = Engine(any_model, max_seqs=4)
    for prompt in PROMPTS[:3]:
        ids = engine.tokenizer.encode(prompt)
        got = engine.generate([prompt], GREEDY)[0]
        assert list(got.token_ids) == full_greedy(any_model, ids, 60, engine.tokenizer.vocab_size)
        assert got.prompt_tokens == len(ids)


def test_cached_logits_equal_full_logits(any_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = Engine(any_model, max_seqs=4), []
    forward = engine._runner.forward
    monkeypatch.setattr(engine._runner, "forward", lambda b: seen.append(forward(b)) or seen[-1])
    prompts = [engine.tokenizer.encode(p) for p in PROMPTS[:3]]
    answers = engine.generate(prompts, GREEDY)
    decoder = directory.load(any_model)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            whole = decoder(torch.tensor([[*prompt, *answer.token_ids]]))[0, len(prompt) - 1 : -1]
        cached = torch.stack([step[row] for step in seen])
        assert (cached - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("options", [{}, {"native": False}, {"speculate": 7}, {"max_prefill_tokens": 16}])
def test_512_cached_tokens_equal_the_full_forward(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_model(tmp_path / "model", "qwen3", seed=3, window=640)
    engine, decoder = Engine(folder, max_seqs=20, **options), directory.load(folder)
    prompts = [engine.tokenizer.encode((PROMPTS[i % 6] + "x" * i) * (i % 3 + 1)) for i in range(20)]
    got = engine.generate(prompts, Sampling(max_tokens=512, ignore_eos=True, logprobs=0))
    for prompt, completion in zip(prompts, got, strict=True):
        with torch.no_grad():
            scores = decoder(torch.tensor([[*prompt, *completion.token_ids]]))[0, len(prompt) - 1 : -1]
        assert scores[:, : engine.tokenizer.vocab_size].argmax(-1).tolist() == list(completion.token_ids)
        known = [t.logprob for t in completion.logprobs or ()]
        best = scores.log_softmax(-1).amax(-1)
        assert len(known) == 512 and (best - torch.tensor(known)).abs().max() <= 1e-4


def test_equals_transformers_generate(any_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine, theirs = Engine(any_model, max_seqs=4), AutoModelForCausalLM.from_pretrained(any_model)
    for prompt in PROMPTS[:4]:
        ids = torch.tensor([engine.tokenizer.encode(prompt)])
        ends = [engine.tokenizer.eos_id, engine.tokenizer.pad_id]
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False, eos_token_id=ends
        )
        got = engine.generate([prompt], Sampling(max_tokens=50))[0]
        assert list(got.token_ids) == expected[0, ids.shape[1] :].tolist()
        ended = got.token_ids[-1] in ends
        assert got.finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=40),
        Sampling(max_tokens=40, temperature=0.9, top_p=0.9, top_k=50, ignore_eos=True),
        Sampling(max_tokens=40, temperature=1.3),
        Sampling(max_tokens=90, temperature=1.0, constraint=Constraint("json_schema", '{"type":"object"}')),
    ],
)
def test_alone_equals_batched(make_engine: Callable[..., Engine], sampling: Sampling) -> None:
    from dataclasses import replace

    each = [replace(sampling, seed=i, max_tokens=sampling.max_tokens - 5 * i) for i in range(len(PROMPTS))]
    alone = [make_engine(max_seqs=1).generate([p], s)[0] for p, s in zip(PROMPTS, each, strict=True)]
    for slots, budget in ((1, 4096), (3, 4096), (8, 4096), (8, 1)):
        engine = make_engine(max_seqs=slots, max_prefill_tokens=budget)
        assert engine.generate(PROMPTS, each) == alone
        assert engine.free_slots == slots
    mixed = make_engine().generate([*PROMPTS, *PROMPTS[::-1]], [*each, *[Sampling(max_tokens=7)] * 6])
    assert mixed[: len(PROMPTS)] == alone


def test_equal_seeds_draw_equally_and_others_do_not(engine: Engine) -> None:
    draws = engine.generate(["李白"] * 3, [Sampling(temperature=1.0, seed=s) for s in (1, 1, 2)])
    assert draws[0] == draws[1] != draws[2]
    unseeded = engine.generate(["李白"] * 2, Sampling(temperature=1.0))
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("stop", [(), ("诗",), ("o", "李白李")])
def test_joined_stream_equals_generated_text(engine: Engine, stop: tuple[str, ...]) -> None:
    for seed in range(10):
        sampling = Sampling(max_tokens=50, temperature=1.0, seed=seed, stop=stop)
        whole = engine.generate(["hello"], sampling)[0]
        deltas = list(engine.stream("hello", sampling))
        assert "".join(d.text for d in deltas) == whole.text
        assert tuple(i for d in deltas for i in d.token_ids) == whole.token_ids
        assert [d.finish_reason for d in deltas if d.finish_reason] == [whole.finish_reason]
        assert not any(s in whole.text for s in stop)


def test_two_streams_in_turn_lose_nothing(engine: Engine) -> None:
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    alone = [engine.generate([p], sampling)[0].text for p in PROMPTS[:2]]
    streams = [engine.stream(p, sampling) for p in PROMPTS[:2]]
    parts: list[list[str]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            parts[i].append(next(stream).text)
    assert ["".join(p) for p in parts] == alone


def test_logprobs_equal_full_forward(any_model: Path) -> None:
    engine, decoder = Engine(any_model, max_seqs=4, max_prefill_tokens=40), directory.load(any_model)
    sequences = [engine.tokenizer.encode(p) for p in [*PROMPTS, "李", "诗" * 30]]
    for ids, got in zip(sequences, engine.logprobs(sequences), strict=True):
        with torch.no_grad():
            scores = decoder(torch.tensor([ids]))[0].log_softmax(-1)
        expected = scores[:-1].gather(1, torch.tensor(ids[1:])[:, None]).flatten()
        assert len(got) == len(ids) - 1
        assert torch.allclose(torch.tensor(got), expected, atol=1e-4)


def test_messages_equal_the_rendered_chat(engine: Engine) -> None:
    messages = [Message("system", "brief"), Message("user", "李白是谁？")]
    from microlm.text.chat import encode_chat

    ids, _ = encode_chat(engine.tokenizer, messages, generation_prompt=True)
    assert engine.generate([messages], GREEDY)[0].text == engine.generate([ids], GREEDY)[0].text


def test_served_equals_generated(engine: Engine) -> None:
    from microlm.engine import EngineService

    sampling = Sampling(max_tokens=30, temperature=0.8, seed=5)
    expected = [c.text for c in engine.generate(PROMPTS, sampling)]

    async def ask() -> list[str]:
        service = EngineService(engine)

        async def one(prompt: str) -> str:
            return "".join([d.text async for d in await service.submit(prompt, sampling)])

        try:
            return list(await asyncio.gather(*map(one, PROMPTS)))
        finally:
            await asyncio.to_thread(service.close)

    assert asyncio.run(ask()) == expected
