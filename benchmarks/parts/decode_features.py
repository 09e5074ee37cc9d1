"""What the engine saves beside the race: cache, prefixes, drafts; and what constraints and codes cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from parts.decode_inputs import Ids, prompts

from microlm.core import runtime
from microlm.core.records import Constraint, Sampling
from microlm.engine import Engine
from microlm.engine.native.weights import quantize, weight_bytes
from microlm.model import directory
from microlm.model.transformer import Decoder, causal_attend
from microlm.text.vocab import domains

Add = Callable[[str, list[float], str], None]
LENGTHS, ANSWERS = (16, 64, 256), (32, 128, 256)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def table(model: Path, quick: bool) -> Iterator[tuple[int, int, float, float]]:
    """Prompt, answer, seconds with the cache, and without: the whole sequence anew for each token."""
    engine = Engine(model, dtype="bfloat16", max_seqs=1, prefix_caching=False)
    decoder = directory.load(model, torch.bfloat16).to(torch.bfloat16).eval()
    engine.generate([[5, 6]], Sampling(max_tokens=2, ignore_eos=True))
    for length in LENGTHS[:2] if quick else LENGTHS:
        for new in ANSWERS[:1] if quick else ANSWERS:
            asked = prompts(1, length, "table", new)
            sampling = Sampling(max_tokens=new, ignore_eos=True)
            cached = min(seconds(lambda a=asked, s=sampling: engine.generate(a, s)) for _ in range(3))
            yield length, new, cached, seconds(lambda a=asked, n=new: _recompute(decoder, a[0], n))


@torch.inference_mode()
def _recompute(decoder: Decoder, prompt: Ids, new: int) -> Ids:
    ids = list(prompt)
    for _ in range(new):
        hidden = decoder.hidden(torch.tensor([ids]), torch.arange(len(ids)), causal_attend)
        ids.append(int(decoder.logits(hidden[0, -1]).argmax()))
    return ids


def prefix(model: Path, add: Add, rounds: int) -> None:
    """Time to the first token after a system prompt of 400 tokens that others had, and anew."""
    engines = {on: Engine(model, dtype="bfloat16", max_seqs=4, prefix_caching=on) for on in (True, False)}
    system, one = prompts(1, 400, "system")[0], Sampling(max_tokens=1, ignore_eos=True)
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        for on, engine in engines.items():
            own = prompts(1, 16, "own", number)[0]
            taken = seconds(lambda e=engine, o=own: e.generate([system + o], one))
            if number:
                found[on].append(taken)
    add("ttft_s.prefix_cached", found[True], "s, 400 shared tokens and 16 own")
    add("ttft_s.prefix_anew", found[False], "s, the same without prefix caching")
    add("prefix_speedup", [b / a for a, b in zip(found[True], found[False], strict=True)], "times")


def constraint(model: Path, add: Add, rounds: int) -> None:
    """Seconds of an answer bound by a pattern over those of a free one of as many tokens."""
    engine = Engine(model, dtype="bfloat16", max_seqs=1, prefix_caching=False, threads=1)
    free = Sampling(max_tokens=128, ignore_eos=True)
    bound = Sampling(max_tokens=128, ignore_eos=True, constraint=Constraint("regex", "[a-z ]{2000}"))
    found: dict[str, list[float]] = {"free": [], "bound": []}
    for number in range(rounds + 1):
        for name, sampling in (("free", free), ("bound", bound)):
            asked = prompts(1, 64, "constraint", number)
            (answer,) = engine.generate(asked, sampling)
            assert len(answer.token_ids) == 128
            taken = seconds(lambda a=asked, s=sampling: engine.generate(a, s))
            if number:
                found[name].append(taken)
    add("constraint_cost", [b / a - 1 for a, b in zip(found["free"], found["bound"], strict=True)], "share")


def memory(model: Path, add: Add) -> None:
    """Bytes of the weights and of a cached position, by kind."""
    for kind in ("none", "int8", "int4"):
        decoder = directory.load(model, torch.bfloat16).to(torch.bfloat16)
        if kind != "none":
            quantize(decoder, kind)
        add(f"weight_bytes.{'bf16' if kind == 'none' else kind}", [weight_bytes(decoder)], "bytes")
    sizes = {}
    for kind in ("auto", "int8", "int4"):
        engine = Engine(model, dtype="bfloat16", max_seqs=4, max_seq_len=512, kv_dtype=kind)
        sizes[kind] = float(engine.cache_bytes)
        add(f"kv_bytes.{'bf16' if kind == 'auto' else kind}", [sizes[kind]], "bytes for 4 x 512 tokens")
    for kind in ("int8", "int4"):
        add(f"kv_memory_share.{kind}", [sizes[kind] / sizes["auto"]], "of bf16's")


def trained(model: Path, add: Add, rounds: int) -> None:
    """On a trained model: bits per byte of text by kind of weights and cache; drafts where it copies."""
    texts = domains.samples()
    text = "\n\n".join(text for domain in texts.values() for text in domain)
    bits = {}
    for name, options in {
        "bf16": {}, "weights_int8": {"quantize": "int8"}, "weights_int4": {"quantize": "int4"},
        "kv_int8": {"kv_dtype": "int8"}, "kv_int4": {"kv_dtype": "int4"},
    }.items():  # fmt: skip
        engine = Engine(model, dtype="bfloat16", max_seqs=1, max_seq_len=1024, **options)
        ids = engine.tokenizer.encode(text)
        pieces = [ids[i : i + 512] for i in range(0, len(ids), 512)]
        nats = -sum(sum(values) for values in engine.logprobs(pieces))
        scored = len(engine.tokenizer.decode([i for piece in pieces for i in piece[1:]]).encode())
        bits[name] = nats / 0.6931471805599453 / scored
        add(
            f"bits_per_byte.{name}",
            [bits[name]],
            f"bits, {scored} bytes of the samples that come with MicroLM",
        )
        if name != "bf16":
            add(f"bits_per_byte_lost.{name}", [bits[name] / bits["bf16"] - 1], "share")
    drafts(model, "\n".join(texts["English"]), add, rounds)


def drafts(model: Path, text: str, add: Add, rounds: int) -> None:
    """An answer that copies from its prompt, with drafts of up to 7 tokens and without; equal ids."""
    lines = "\n".join(text.splitlines()[:6])
    engines = {n: Engine(model, dtype="bfloat16", max_seqs=1, threads=1, speculate=n) for n in (0, 7)}
    asked = engines[0].tokenizer.encode(f"{lines}\n\n{lines}\n\n{lines[: len(lines) // 4]}")
    sampling = Sampling(max_tokens=128, ignore_eos=True)
    answers = {n: engine.generate([asked], sampling)[0].token_ids for n, engine in engines.items()}
    assert answers[0] == answers[7], "drafts changed the answer"
    found: dict[int, list[float]] = {n: [] for n in engines}
    for _ in range(rounds):
        for n, engine in engines.items():
            found[n].append(seconds(lambda e=engine: e.generate([asked], sampling)))
    add("speculation_speedup", [a / b for a, b in zip(found[0], found[7], strict=True)], "times, copying")


def plot(rows: list[tuple[int, int, float, float]], file: Path) -> None:
    """The table as a picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for length in sorted({row[0] for row in rows}):
        own = [(new, anew / cached) for at, new, cached, anew in rows if at == length]
        axes.plot(*zip(*own, strict=True), marker="o", label=f"prompt of {length}")
    axes.set_xlabel("new tokens")
    axes.set_ylabel("times faster with the cache")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.set_title(f"25.8M weights, bf16, {runtime.cpu_name()}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
