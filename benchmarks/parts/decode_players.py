"""Who takes part in the benchmark of decoding: our engine, transformers, llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from microlm.core.records import Sampling
from microlm.engine import Engine

Ids = list[int]


class Player(NamedTuple):
    """`answer(prompts, new)`: so many greedy tokens after each prompt, EOS ignored.

    `judge(prompt, new)`: those of one prompt, with the log-probability that it gave each of them.
    """

    name: str
    answer: Callable[[list[Ids], int], list[Ids]]
    judge: Callable[[Ids, int], tuple[Ids, list[float]]] | None = None


def ours(model: Path, name: str, threads: int, **options: Any) -> Player:
    """Our engine; nothing is kept from one prompt to the next."""
    fields = {"dtype": "bfloat16", "max_seqs": 32, "prefix_caching": False, **options}
    engine = Engine(model, threads=threads, **fields)
    engine.warm(lambda told: print(told, file=sys.stderr))

    def answer(prompts: list[Ids], new: int) -> list[Ids]:
        sampling = Sampling(max_tokens=new, ignore_eos=True)
        return [list(c.token_ids) for c in engine.generate(prompts, sampling)]

    def judge(prompt: Ids, new: int) -> tuple[Ids, list[float]]:
        (found,) = engine.generate([prompt], Sampling(max_tokens=new, ignore_eos=True, logprobs=0))
        return list(found.token_ids), [one.logprob for one in found.logprobs or ()]

    return Player(name, answer, judge)


def huggingface(model: Path, name: str, dtype: torch.dtype, static: bool = False) -> Player:
    """`generate` of transformers, its cache dynamic or static."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def answer(prompts: list[Ids], new: int) -> list[Ids]:
        ids = torch.tensor(prompts)
        kind = {"cache_implementation": "static"} if static else {}
        found = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            use_cache=True, pad_token_id=0, eos_token_id=None, disable_compile=True, **kind,
        )  # fmt: skip
        return [row[len(prompts[0]) :] for row in found.tolist()]

    return Player(name, answer)


def llamacpp(file: Path, name: str, threads: int) -> Player:
    """llama.cpp in this process, one sequence."""
    try:
        import xllamacpp
    except ImportError:
        sys.exit("benchmarks/decode.py: xllamacpp is missing; pip install xllamacpp gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def ask(prompt: Ids, new: int, **fields: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0.0, "top_k": 1, "ignore_eos": True}
        found = server.handle_completions({**body, "cache_prompt": False, **fields})
        if "choices" not in found or found["usage"]["completion_tokens"] != new:
            sys.exit(f"benchmarks/decode.py: llama.cpp answered {found}")
        return dict(found["choices"][0])

    def answer(prompts: list[Ids], new: int) -> list[Ids]:
        for prompt in prompts:
            ask(prompt, new)
        return []  # it answers with text

    def judge(prompt: Ids, new: int) -> tuple[Ids, list[float]]:
        content = ask(prompt, new, logprobs=1)["logprobs"]["content"]
        return [token["id"] for token in content], [token["logprob"] for token in content]

    return Player(name, answer, judge)
