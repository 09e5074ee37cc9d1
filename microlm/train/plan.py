"""What a training run takes, before it starts: weights, memory, arithmetic, data, time.

Enters: a recipe, the configuration it trains and the shards, as far as they are there. Leaves: a `Plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microlm.core import runtime
from microlm.core.peak import peak_flops
from microlm.model import lora
from microlm.model.config import ModelConfig
from microlm.text.corpus.token_sets import PREFERENCES
from microlm.text.shards import open_sets, task_of
from microlm.train.batches import TooLong
from microlm.train.batches.lengths import Lengths, sentences
from microlm.train.batches.pairs import pairs_of
from microlm.train.batches.spans import spans_of, unread
from microlm.train.job import LoopRecipe
from microlm.train.memory import Memory, available, predict, shadow, teacher_bytes
from microlm.train.pretrain import PretrainRecipe
from microlm.train.ranks import limited_threads, processes
from microlm.train.reporter.speed import position_flops
from microlm.train.tuning.distil import DistilRecipe
from microlm.train.tuning.dpo import DpoRecipe
from microlm.train.tuning.grpo import GrpoRecipe, answering_bytes
from microlm.train.tuning.sft import SftRecipe

DOCUMENTS = "documents"
Trainable = PretrainRecipe | SftRecipe | DpoRecipe | DistilRecipe
"""The stages whose rows are there before they run."""


@dataclass(frozen=True)
class Plan:
    """Counts of weights, bytes a process, FLOPs, positions; of shards that are there epochs and lengths."""

    config: ModelConfig
    parameters: dict[str, int]
    trained: int
    memory: Memory
    memory_free: int
    processes: int
    dtype: str
    device: str
    steps: int
    batch_tokens: int
    tokens: int
    flops_per_token: float
    epochs: dict[str, float]
    peak_flops: float | None
    lengths: dict[str, Lengths]
    context: int
    too_long: TooLong
    tokens_per_s: float | None = None

    @property
    def flops(self) -> float:
        """Of the whole run, validation apart."""
        return self.tokens * self.flops_per_token

    @property
    def seconds_at_peak(self) -> float | None:
        """The time below which no run can come on this device; None when its peak was not asked for."""
        return self.flops / (self.peak_flops * self.processes) if self.peak_flops else None

    @property
    def seconds(self) -> float | None:
        """The time at the speed that was measured."""
        return self.tokens / self.tokens_per_s if self.tokens_per_s else None

    def to_json(self) -> dict[str, Any]:
        """Every figure; those that were not measured are null."""
        memory = asdict(self.memory) | {"total": self.memory.total, "free": self.memory_free}
        derived = {"flops": self.flops, "seconds_at_peak": self.seconds_at_peak, "seconds": self.seconds}
        plain = {k: v for k, v in asdict(self).items() if k != "memory_free"}
        return plain | {"parameters_total": sum(self.parameters.values()), "memory": memory} | derived

    def lines(self) -> Iterator[str]:
        """For people, a subject a line."""
        c, m, parts = self.config, self.memory, self.parameters
        heads = f"{c.num_attention_heads} heads ({c.num_key_value_heads} key-value) of {c.head_dim}"
        yield (
            f"model       {c.model_type}: {c.num_hidden_layers} layers, width {c.hidden_size}, {heads}, "
            f"SwiGLU {c.intermediate_size}, {c.vocab_size:,} tokens, {c.max_position_embeddings:,} positions"
        )
        told = ", ".join(f"{k} {v:,}" for k, v in parts.items() if v)
        some = "" if self.trained == sum(parts.values()) else f"; {self.trained:,} are trained"
        yield f"parameters  {sum(parts.values()):,}: {told}{some}"
        sizes = {k: v for k, v in asdict(m).items() if k != "holes" and v}
        told = ", ".join(f"{k} {_mib(v)}" for k, v in sizes.items())
        yield f"memory      {_mib(m.total)} MiB a process ({told}), {_mib(self.memory_free)} free"
        per_token, whole = f"{self.flops_per_token:.3g}", f"{self.flops:.3g}"
        yield f"arithmetic  {per_token} FLOPs a token, {whole} in all, in {self.dtype}"
        steps = f"{self.steps:,} steps of {self.batch_tokens:,}"
        epochs = ", ".join(f"{n} {e:.2f}" for n, e in self.epochs.items()) or "unknown, no data is there"
        yield f"data        {self.tokens:,} tokens in {steps}; epochs: {epochs}"
        for line in sentences(self.lengths, self.context, self.too_long):
            yield f"samples     {line}"
        yield f"time        {self._time()}"

    def _time(self) -> str:
        many = f"{self.processes} process" + ("es" if self.processes > 1 else "")
        if self.seconds is not None:
            return f"{_clock(self.seconds)} at {self.tokens_per_s:,.0f} tokens/s, measured with {many}"
        if self.peak_flops is None or self.seconds_at_peak is None:
            return "not measured"
        return (
            f"more than {_clock(self.seconds_at_peak)}: that is {many} at the peak of {self.device}, "
            f"{self.peak_flops / 1e9:,.0f} GFLOP/s; --measure times real steps"
        )


def plan(
    recipe: Trainable | GrpoRecipe,
    config: ModelConfig,
    index: Mapping[str, Any],
    shards: Path | None = None,
    teacher: ModelConfig | None = None,
    peak: bool = True,
) -> Plan:
    """What `recipe` takes to train `config` on shards with this index; their samples are counted if there.

    Of `grpo`, whose `index` has the number of `prompts`, it is the most: one row for each answer.
    `teacher` computes a forward pass beside each; `peak`: time the device as well.
    """
    loop = recipe.sized if isinstance(recipe, GrpoRecipe) else recipe.loop
    ranks = processes(recipe.parallel)
    adapter = None if isinstance(recipe, PretrainRecipe) or not recipe.lora else recipe.lora.config()
    decoder = shadow(config, loop, adapter)
    memory = predict(decoder, loop, recipe.optim, ranks)
    weights = {p: p.numel() for p in decoder.parameters()}
    added = sum(p.numel() for p in lora.adapter_parameters(decoder))
    body, head = position_flops(decoder, loop.context)
    sets = _sets(recipe, index)
    seen = sum(s["tokens"] for s in sets.values())
    labelled = sum(s["labels"] for s in sets.values()) / seen if seen else 1.0
    batch_tokens = loop.batch_rows * loop.context
    flops = body + labelled * head
    if teacher:
        memory = replace(memory, teacher=teacher_bytes(teacher, loop))
        flops += _forward_flops(teacher, loop, labelled)
    if isinstance(recipe, GrpoRecipe):
        memory = replace(memory, answers=answering_bytes(recipe, config))
    return Plan(
        config=config,
        parameters=config.parameter_parts() | ({"adapter": added} if added else {}),
        trained=sum(n for p, n in weights.items() if p.requires_grad),
        memory=memory,
        memory_free=available(),
        processes=ranks,
        dtype=str(loop.compute_dtype()).removeprefix("torch."),
        device=_device_name(),
        steps=loop.steps,
        batch_tokens=batch_tokens,
        tokens=loop.steps * batch_tokens,
        flops_per_token=flops,
        epochs=_asked(recipe, index)
        if isinstance(recipe, GrpoRecipe)
        else _epochs(recipe, sets, loop.steps * batch_tokens),
        lengths=_lengths(recipe, shards, sets) if shards and not isinstance(recipe, GrpoRecipe) else {},
        context=loop.context,
        too_long=_too_long(recipe),
        peak_flops=_peak(recipe) if peak else None,
    )


def _forward_flops(config: ModelConfig, loop: LoopRecipe, labelled: float) -> float:
    """Of a model that is only asked: a third of a training step."""
    body, head = position_flops(shadow(config, loop), loop.context)
    return (body + labelled * head) / 3


def _sets(recipe: Trainable | GrpoRecipe, index: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Task (or `documents`) → counts of the training sets that the recipe reads."""
    found = {}
    for name, counts in index.get("sets", {}).items():
        task, are_pairs = task_of(name), name.startswith(PREFERENCES)
        if not name.endswith("-train") or are_pairs != isinstance(recipe, DpoRecipe):
            continue
        wanted = getattr(recipe, "mixture", {DOCUMENTS: 1.0})
        if wanted.get(task, 0.0) > 0 or (not wanted and task != DOCUMENTS):
            found[task] = counts
    return found


def _too_long(recipe: Trainable | GrpoRecipe) -> TooLong:
    return "split" if isinstance(recipe, PretrainRecipe) else getattr(recipe, "too_long", "drop")


def _lengths(recipe: Trainable, shards: Path, wanted: Iterable[str]) -> dict[str, Lengths]:
    """What becomes of the samples (or pairs) of each training set that the recipe reads."""
    context, rest = recipe.loop.context, unread(recipe.loop.document_mask)
    if isinstance(recipe, DpoRecipe):
        pairs = open_sets(shards, f"{PREFERENCES}-", "train")
        return {n: pairs_of(pairs[n], context, recipe.too_long).lengths for n in sorted(wanted)}
    sets = open_sets(shards, "", "train")
    return {n: spans_of(sets[n], context, rest, _too_long(recipe))[1] for n in sorted(wanted)}


def _epochs(recipe: Trainable, sets: Mapping[str, Mapping[str, int]], tokens: int) -> dict[str, float]:
    """How often each set is read, by its share of the positions."""
    mixture = getattr(recipe, "mixture", {})
    total = sum(mixture.get(n, 1.0) for n in sets)
    return {n: tokens * mixture.get(n, 1.0) / total / max(1, s["tokens"]) for n, s in sets.items()}


def _asked(recipe: GrpoRecipe, index: Mapping[str, Any]) -> dict[str, float]:
    """How often the prompts are asked, where their number is known."""
    rounds = -(-recipe.steps // recipe.answers.updates)
    return {"prompts": rounds * recipe.answers.prompts / n} if (n := index.get("prompts")) else {}


def _peak(recipe: Trainable | GrpoRecipe) -> float:
    """Of one process, with its threads."""
    with limited_threads(recipe.parallel.threads):
        return peak_flops(recipe.loop.compute_dtype())


def _device_name() -> str:
    return torch.cuda.get_device_name() if runtime.device().type == "cuda" else runtime.cpu_name()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def _clock(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"
