"""Drafts change nothing; a request's end is told once, with its reason. A stand-in gives the scores."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import microlm
from microlm.core.records import Constraint, Sampling, TokenLogprob
from microlm.engine.grammar import Grammars
from microlm.engine.output import TextStream
from microlm.engine.postprocess import Postprocess, Scored
from microlm.engine.request import Request
from microlm.engine.sampling import Penalties, RandomStream
from microlm.text.tokenizer import Tokenizer

PROMPT = [300, 400, 500]
HEAD = 6500  # rows of the model's head, more than the tokenizer has


class Kit(NamedTuple):
    tokenizer: Tokenizer
    grammars: Grammars
    postprocess: Postprocess


@pytest.fixture(scope="module")
def kit() -> Kit:
    tokenizer = Tokenizer.load(Path(microlm.__file__).parent / "ready" / "zh-6400")
    ends = {tokenizer.eos_id, tokenizer.pad_id}
    return Kit(tokenizer, Grammars(tokenizer), Postprocess(tokenizer, ends))


def request_of(kit: Kit, sampling: Sampling, live: bool = True, limit: int | None = None) -> Request:
    size = kit.tokenizer.vocab_size
    return Request(
        PROMPT,
        sampling,
        limit or sampling.max_tokens,
        random=RandomStream(sampling.seed) if sampling.temperature > 0 else None,
        penalties=Penalties.of(sampling, PROMPT, size),
        matcher=kit.grammars.matcher(sampling.constraint) if sampling.constraint else None,
        text=TextStream(kit.tokenizer, sampling.stop) if live else None,
    )


def scores_after(output: Sequence[int], salt: int = 0) -> Tensor:
    """Scores [HEAD] that depend on all that was said; now and then they repeat, so that drafts come true."""
    seed = (hash((salt, tuple(output[-2:]))) * 31) % 2**31
    return torch.randn(HEAD, generator=torch.Generator().manual_seed(seed)) * 3


class Told(NamedTuple):
    ids: list[int]
    text: str
    logprobs: list[TokenLogprob]
    reason: str | None
    error: str


def run(kit: Kit, requests: list[Request], drafts: random.Random | None = None) -> list[Told]:
    """Step all requests to their ends; with `drafts`, each step tries a guess that is sometimes right."""
    told = {r: Told([], "", [], None, "") for r in requests}
    known = {r: run(kit, [copy_of(kit, r)])[0].ids for r in requests} if drafts else {}
    while left := [r for r in requests if r.finish_reason is None]:
        rows, parts = [], []
        for r in left:
            draft: list[int] = []
            if drafts:
                right = known[r][len(r.output) : len(r.output) + drafts.randrange(4)]
                draft = right + [drafts.randrange(6400) for _ in range(drafts.randrange(3))]
            rows.append(Scored(r, len(parts), tuple(draft)))
            parts += [scores_after([*r.output, *draft[:j]], r.sampling.top_k) for j in range(len(draft) + 1)]
        bound = [r.matcher for r in left if r.matcher is not None]
        masks = kit.grammars.begin(bound) if bound else None
        logits = torch.stack(parts)
        before = logits.clone()
        for request, delta in kit.postprocess.apply(rows, logits, masks):
            old = told[request]
            assert old.reason is None
            told[request] = Told(
                old.ids + list(delta.token_ids), old.text + delta.text, old.logprobs + list(delta.logprobs),
                delta.finish_reason, delta.error,
            )  # fmt: skip
        assert torch.equal(logits, before)
    return [told[r] for r in requests]


def copy_of(kit: Kit, request: Request) -> Request:
    return request_of(kit, request.sampling, request.text is not None, request.limit)


SCHEMA = (
    '{"type":"object","properties":{"a":{"type":"integer"},"b":{"enum":["x","yy"]}},"required":["a","b"]}'
)
SETTINGS = [
    Sampling(max_tokens=30),
    Sampling(max_tokens=30, temperature=1.0, seed=3, logprobs=2),
    Sampling(max_tokens=30, temperature=0.9, top_p=0.8, top_k=40, seed=4, stop=("a", "一")),
    Sampling(max_tokens=30, repetition_penalty=1.4, presence_penalty=1, frequency_penalty=0.5, logprobs=0),
    Sampling(max_tokens=60, temperature=1.0, seed=5, constraint=Constraint("json_schema", SCHEMA)),
    Sampling(max_tokens=40, temperature=1.5, seed=6, constraint=Constraint("regex", "[李白a-c]{5,9}")),
    Sampling(max_tokens=3, seed=7, constraint=Constraint("json_object"), logprobs=1),
]


def test_drafts_change_neither_ids_nor_text_nor_grammar_nor_logprobs(kit: Kit) -> None:
    rng = random.Random(9)
    for trial in range(6):
        each = [
            replace(s, seed=None if s.seed is None else s.seed + trial, top_k=s.top_k + trial)
            for s in SETTINGS
        ]
        plain = [run(kit, [request_of(kit, s)])[0] for s in each]
        assert run(kit, [request_of(kit, s) for s in each]) == plain
        assert run(kit, [request_of(kit, s) for s in each], rng) == plain
    assert len({told.reason for told in plain}) == 2


def test_what_is_told_is_what_the_request_holds(kit: Kit) -> None:
    for sampling in SETTINGS:
        request = request_of(kit, sampling)
        told = run(kit, [request])[0]
        assert told.ids == request.output and told.text == "".join(request.pieces)
        if not sampling.stop:
            assert told.text == kit.tokenizer.decode(request.output)
        count = 0 if sampling.logprobs is None else len(told.ids)
        assert len(told.logprobs) == count and told.logprobs == request.logprobs
        for place, known in enumerate(told.logprobs):
            exact = scores_after(told.ids[:place], sampling.top_k).double().log_softmax(-1)
            assert known.token_id == told.ids[place]
            assert abs(known.logprob - float(exact[known.token_id])) < 1e-12
            assert all(i < 6400 for i, _ in known.top) and len(known.top) == sampling.logprobs


def test_nobody_reads_along_one_delta_at_the_end(kit: Kit) -> None:
    request = request_of(kit, SETTINGS[0], live=False)
    steps = []
    while request.finish_reason is None:
        steps.append(kit.postprocess.apply([Scored(request, 0)], scores_after(request.output)[None]))
    assert steps[:-1] == [[]] * 29 and steps[-1][0][1].finish_reason == "length"
    assert request.output == run(kit, [request_of(kit, SETTINGS[0])])[0].ids


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("json_object", "", "inside the JSON: max_tokens reached; raise it from 1"),
        ("json_schema", SCHEMA, "inside the JSON: max_tokens reached"),
        ("regex", "[a-c]{50}", "inside the pattern"),
        ("choice", '["a long text that is one of the choices"]', "inside the choice"),
        ("grammar", "start: /[a-c]{50}/", "inside the grammar"),
    ],
)
def test_an_answer_cut_off_inside_its_grammar_carries_an_error(
    kit: Kit, kind: Any, value: str, words: str
) -> None:
    sampling = Sampling(max_tokens=1, temperature=1.0, seed=1, constraint=Constraint(kind, value))
    told = run(kit, [request_of(kit, sampling)])[0]
    assert told.reason == "length" and words in told.error
    window = run(kit, [request_of(kit, replace(sampling, max_tokens=9), limit=1)])[0]
    assert window.reason == "length" and "the window is full" in window.error


def test_an_answer_that_could_end_where_it_was_cut_is_whole(kit: Kit) -> None:
    sampling = Sampling(max_tokens=2, temperature=1.0, seed=1, constraint=Constraint("regex", "[a-z]*"))
    told = run(kit, [request_of(kit, sampling)])[0]
    assert (told.reason, told.error) in (("length", ""), ("stop", ""))
    assert run(kit, [request_of(kit, replace(sampling, constraint=None))])[0].error == ""


def test_scores_that_are_not_finite_end_that_request_only(kit: Kit) -> None:
    good, bad, bound = (request_of(kit, s) for s in (SETTINGS[0], SETTINGS[1], SETTINGS[4]))
    logits = torch.stack([scores_after([])] * 3)
    logits[1, 77] = float("nan")
    logits[0, 6450] = 1e30  # a row of a padded head means nothing
    masks = kit.grammars.begin([bound.matcher]) if bound.matcher else None
    step = kit.postprocess.apply([Scored(good, 0), Scored(bad, 1, (1, 2)), Scored(bound, 2)], logits, masks)
    assert [d.finish_reason for _, d in step] == [None, "error", None]
    assert "finite" in bad.error and bad.output == [] and step[1][1].token_ids == ()
    assert good.output == [int(scores_after([])[:6400].argmax())]
    assert kit.tokenizer.decode(bound.output).startswith("{")


def test_the_end_of_sequence_ends_unless_it_is_ignored(kit: Kit) -> None:
    scores = scores_after([])
    scores[kit.tokenizer.eos_id] = 1000.0
    ended, ignored = (
        request_of(kit, Sampling(max_tokens=2)),
        request_of(kit, Sampling(max_tokens=2, ignore_eos=True)),
    )
    step = kit.postprocess.apply([Scored(ended, 0), Scored(ignored, 1)], scores.repeat(2, 1))
    assert [d.finish_reason for _, d in step] == ["stop", None]
    assert ended.output == ignored.output == [kit.tokenizer.eos_id] and step[0][1].text == ""


def test_a_token_that_was_said_is_penalised_at_the_next_step(kit: Kit) -> None:
    scores = torch.zeros(1, HEAD)
    scores[0, 50:60] = torch.arange(10) + 1.0
    request = request_of(kit, Sampling(max_tokens=5, frequency_penalty=1.5))
    while request.finish_reason is None:
        kit.postprocess.apply([Scored(request, 0)], scores)
    assert request.output == [59, 58, 59, 57, 58]


def test_a_mask_without_any_token_is_an_error(kit: Kit) -> None:
    class Nothing:
        def wait(self) -> Tensor:
            return torch.zeros(1, 6400, dtype=torch.bool)

    request = request_of(kit, SETTINGS[4])
    step = kit.postprocess.apply([Scored(request, 0)], scores_after([])[None], cast(Any, Nothing()))
    assert step[0][1].finish_reason == "error" and "grammar allowed no token" in request.error


def step_all(kit: Kit, requests: list[Request], way: Callable[[list[Scored], Tensor, Any], object]) -> None:
    """A step of all that still run, every second one with a draft."""
    left = [r for r in requests if r.finish_reason is None]
    draft = (1, 2)
    rows = [Scored(r, 3 * i, draft if i % 2 else ()) for i, r in enumerate(left)]
    parts = [scores_after([*r.output, *draft[:j]], r.sampling.top_k) for r in left for j in range(3)]
    bound = [r.matcher for r in left if r.matcher is not None]
    way(rows, torch.stack(parts), kit.grammars.begin(bound) if bound else None)


def require_equal(host: list[Request], device: list[Request]) -> None:
    for a, b in zip(host, device, strict=True):
        assert (a.output, a.finish_reason, a.error) == (b.output, b.finish_reason, b.error)
        assert a.output and "".join(a.pieces) == "".join(b.pieces)
        assert np.allclose(*([k.logprob for k in r.logprobs] for r in (a, b)), atol=1e-6)
        assert [[i for i, _ in k.top] for k in a.logprobs] == [[i for i, _ in k.top] for k in b.logprobs]


def test_the_way_of_a_gpu_gives_the_same_on_the_cpu(kit: Kit) -> None:
    """Without a GPU its way is taken by hand: rows drawn at once, the rest row by row."""

    def as_on_device(rows: list[Scored], logits: Tensor, masks: Any) -> None:
        allowed = kit.postprocess._first_masks(rows, masks)
        gains, rest, scores = kit.postprocess._on_device(rows, logits, allowed)
        for row in rest:
            own = allowed.get(row.request)
            kit.postprocess._draw_all(row, scores.numpy(), own, gains[row.request])
        for request, gain in gains.items():
            kit.postprocess._delta(request, gain)

    host, device = ([request_of(kit, s) for s in (*SETTINGS, SETTINGS[1])] for _ in range(2))
    for _ in range(8):
        step_all(kit, host, kit.postprocess.apply)
        step_all(kit, device, as_on_device)
    require_equal(host, device)


@pytest.mark.gpu
def test_rows_on_a_gpu_give_what_rows_on_the_cpu_give(kit: Kit) -> None:
    def on_gpu(rows: list[Scored], logits: Tensor, masks: Any) -> None:
        kit.postprocess.apply(rows, logits.cuda(), masks)

    host, device = ([request_of(kit, s) for s in (*SETTINGS, SETTINGS[1])] for _ in range(2))
    for _ in range(8):
        step_all(kit, host, kit.postprocess.apply)
        step_all(kit, device, on_gpu)
    require_equal(host, device)
