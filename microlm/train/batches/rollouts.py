"""Prompts → batches of answers that the model gives when a step asks for them, never ahead.

Shapes: R rows, T tokens of context, M figures that are told of an answer. Seeds come from the place of a
prompt, so a run that goes on draws what an undisturbed one would.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor

from microlm.core import runtime
from microlm.core.recipe import Recipe
from microlm.core.records import Sampling
from microlm.train.batches.answers import NAME, Answer, Comparison, Floats, Respondent, advantages, pack
from microlm.train.batches.batch import Batch
from microlm.train.batches.order import Order
from microlm.train.batches.prompts import Prompt, Prompts

Scorer = Callable[[Batch], Tensor]
"""A log-probability [R,T] of each label of a batch, 0 where this rank does not train."""
TOLD = ("solved", "answer_tokens", "truncated", "flat_groups")
"""What is told of each answer besides its rewards; `solved`: every reward is 1."""


class AnswersRecipe(Recipe):
    """How answers are drawn, and what of them is learnt."""

    prompts: int = Field(default=16, ge=1, description="prompts of a step")
    group: int = Field(default=8, ge=2, description="answers to each prompt, compared with each other")
    max_tokens: int = Field(default=128, ge=1, description="longest answer, in tokens")
    temperature: float = Field(default=1.0, gt=0, le=2, description="of the draw, and of the policy")
    updates: int = Field(default=1, ge=1, le=16, description="steps that learn from the same answers")
    advantage: Comparison = Field(
        default="std", description="reward less the group's mean; std: over its standard deviation (GRPO)"
    )
    per: Literal["token", "answer"] = Field(
        default="token", description="what counts alike: each token (DAPO), or each answer (GRPO)"
    )
    precision: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto", description="weights that the engine answers with; auto: as loop.dtype"
    )
    rows: int = Field(default=64, ge=1, le=1024, description="answers that are written at once")


@dataclass
class RolloutRows:
    """Rows of answers; `scorers` name log-probabilities that are known before a step changes the weights."""

    prompts: Prompts
    respondent: Respondent
    recipe: AnswersRecipe
    context: int
    micro_rows: int
    seed: int
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    _last: tuple[int, Batch] | None = None

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the M figures that are told of an answer: rewards first."""
        judges = self.respondent.judges
        return ("reward", *(f"reward_{name}" for name in judges if len(judges) > 1), *TOLD)

    def batches(self, rows: int, state: dict[str, Any] | None = None, workers: int = 0) -> RolloutStream:
        """A batch has as many rows as its answers need, in whole micro-batches; `rows` changes nothing."""
        return RolloutStream(self, state)

    def told(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """How often the prompts have been asked up to a stream's `state()`; who is not asked, by reason."""
        asked = round(state["place"] / len(self.prompts.asked), 4)
        return {"epochs": {NAME: asked}, "conversations_not_asked": dict(self.prompts.dropped)}

    def chosen(self, place: int) -> Prompt:
        """The prompt at a place of an endless, seeded order."""
        asked = self.prompts.asked
        epoch, index = divmod(place, len(asked))
        order = Order(len(asked), runtime.derive_seed(self.seed, "prompts", epoch))
        return asked[int(order.take(index, index + 1)[0])]

    def make(self, number: int, place: int, check: Callable[[], None]) -> Batch:
        """The batch of round `number`, whose first prompt is at `place`.

        A round that is asked for twice in a row is answered once: no step came between.
        """
        if self._last is None or self._last[0] != number:
            places = range(place, place + self.recipe.prompts)
            prompts = [self.chosen(p) for p in places]
            answers = self.respondent.answers(prompts, [self._sampling(p) for p in places], check)
            self._last = number, self._scored(self._learnt(answers))
        return self._last[1]

    def _sampling(self, place: int) -> Sampling:
        r, seed = self.recipe, runtime.derive_seed(self.seed, "answers", place)
        return Sampling(r.max_tokens, r.temperature, seed=seed, n=r.group, logprobs=0)

    def _learnt(self, answers: Sequence[Answer]) -> Batch:
        rewards = self.respondent.total(answers)
        found, flat = advantages(rewards, self.recipe.group, self.recipe.advantage)
        tokens = sum(len(a.ids) for a in answers)
        weights = [len(answers) / tokens if self.recipe.per == "token" else 1 / len(a.ids) for a in answers]
        return pack(
            answers,
            {"advantage": found, "weight": np.array(weights)},
            figures(answers, rewards, flat),
            (self.context, self.micro_rows),
        )

    def _scored(self, batch: Batch) -> Batch:
        """With all ranks' scores on each: rank 0 alone writes what a round that is cut goes on from."""
        ranks = self.respondent.ranks
        found = {name: ranks.sum_(scorer(batch)) for name, scorer in self.scorers.items()}
        return replace(batch, extras={**batch.extras, **found})


class HeldOutAnswers(RolloutRows):
    """The greedy answer to each prompt, once, in batches of so many rows; then empty batches.

    The advantage is the reward itself: the validation loss is minus the reward (and what the KL costs).
    """

    def batches(self, rows: int, state: dict[str, Any] | None = None, workers: int = 0) -> HeldOutStream:
        """One validation."""
        return HeldOutStream(self, rows)

    def make_all(self, check: Callable[[], None]) -> Batch:
        """All answers by the weights of now."""
        prompts = self.prompts.asked
        asked = Sampling(self.recipe.max_tokens, logprobs=0)
        answers = self.respondent.answers(prompts, [asked] * len(prompts), check)
        rewards = self.respondent.total(answers)
        weights = np.array([1 / len(a.ids) for a in answers])
        told = figures(answers, rewards, np.zeros(len(answers), dtype=bool))
        batch = pack(
            answers, {"advantage": rewards, "weight": weights}, told, (self.context, self.micro_rows)
        )
        return self._scored(batch)


def figures(answers: Sequence[Answer], rewards: Floats, flat: Any) -> Floats:
    """What is told of each answer, [answers, M]."""
    parts = np.array([a.rewards for a in answers])
    rest = np.array([[len(a.ids), a.truncated] for a in answers], dtype=np.float64)
    several = parts if parts.shape[1] > 1 else parts[:, :0]
    solved = (parts >= 1).all(axis=1)
    return np.column_stack([rewards, several, solved, rest, flat]).astype(np.float64)


class RolloutStream:
    """Batches of answers; those of a round again for as many steps as the recipe says.

    Between steps of one round the state holds its batch: the weights that gave it are gone.
    """

    def __init__(self, source: RolloutRows, state: dict[str, Any] | None) -> None:
        self.waited_s, self.labels = 0.0, 0
        self._source, self._check = source, _nothing
        start: dict[str, Any] = {"place": 0, "rounds": 0, "used": 0, "rows": 0, "padding": 0, "held": ""}
        self._state = start | (state or {})
        self._batch = _unpacked(self._state["held"]) if self._state["held"] else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is made ahead."""

    def __next__(self) -> Batch:
        started, s, recipe = time.perf_counter(), dict(self._state), self._source.recipe
        if self._batch is None:
            self._batch = self._source.make(s["rounds"], s["place"], self._check)
            s |= {"place": s["place"] + recipe.prompts, "rounds": s["rounds"] + 1, "used": 0}
            s["held"] = _packed(self._batch) if recipe.updates > 1 else ""
        batch = self._batch
        s["used"] += 1
        s["rows"] += len(batch.labels)
        s["padding"] += int((batch.segments < 0).sum())
        if s["used"] >= recipe.updates:  # fewer than before, where a run goes on with other settings
            self._batch, s["held"] = None, ""
        self._state = s
        self.waited_s += time.perf_counter() - started
        self.labels += batch.label_count
        return batch

    def state(self) -> dict[str, Any]:
        """The place after the last batch that was taken, as JSON values."""
        return self._state

    def watch(self, check: Callable[[], None]) -> None:
        """`check` is called between the tokens of answers; what it raises gives them up."""
        self._check = check


class HeldOutStream(RolloutStream):
    """The rows of one validation, so many at a time."""

    def __init__(self, source: HeldOutAnswers, rows: int) -> None:
        super().__init__(source, None)
        self._all, self._rows, self._at = source.make_all, rows, 0

    def __next__(self) -> Batch:
        if self._batch is None:
            self._batch = self._all(self._check)
        self._at += self._rows
        return self._batch.rows(self._at - self._rows, self._at)


def _nothing() -> None:
    """No reason to stop."""


def _packed(batch: Batch) -> str:
    """A batch as text that a checkpoint keeps."""
    parts = {"ids": batch.input_ids, "labels": batch.labels, "segments": batch.segments}
    samples = torch.tensor([[r, n] for r, row in enumerate(batch.samples) for _, n in row])
    extras = {f"extras/{name}": extra for name, extra in batch.extras.items()}
    return base64.b64encode(save({**parts, "samples": samples, **extras})).decode()


def _unpacked(text: str) -> Batch:
    parts = load(base64.b64decode(text))
    samples: list[list[tuple[str, int]]] = [[] for _ in parts["ids"]]
    for row, number in parts.pop("samples").tolist():
        samples[row].append((NAME, number))
    extras = {n.removeprefix("extras/"): t for n, t in parts.items() if n.startswith("extras/")}
    return Batch(parts["ids"], parts["labels"], parts["segments"], tuple(map(tuple, samples)), extras)
