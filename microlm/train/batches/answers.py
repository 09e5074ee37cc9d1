"""Answers of the model under training: drawn, judged, compared within their group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from microlm.core.errors import CheckFailed
from microlm.core.records import Completion, Sampling
from microlm.train.batches.prompts import Prompt
from microlm.train.ranks import Ranks, Stopped

Rollout = Callable[[Sequence[Sequence[int]], Sequence[Sampling], Callable[[], None]], list[Completion]]
"""`(ids of prompts, how each is answered, check) → sampling.n completions for each`, by the weights of now.

`check` is called between tokens; what it raises ends the answering.
"""
Reward = Callable[[Prompt, Completion], float]
"""How good an answer is, from 0 to 1 (right)."""
Comparison = Literal["std", "mean"]
Floats = NDArray[np.float64]
_FLAT = 1e-9  # rewards that are closer are the same


class Judge(NamedTuple):
    """A reward, and its part in the sum that is trained on."""

    weight: float
    reward: Reward


@dataclass(frozen=True, slots=True)
class Answer:
    """Ids (EOS included), the engine's log-probability of each, every judge's reward, how it ended."""

    prompt: Prompt
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rewards: tuple[float, ...]
    truncated: bool

    @property
    def size(self) -> int:
        """Positions that prompt and answer fill."""
        return len(self.prompt.ids) + len(self.ids) - 1


@dataclass(frozen=True)
class Respondent:
    """Draws and judges: each rank asks its share of the prompts, all get all answers."""

    rollout: Rollout
    judges: Mapping[str, Judge]
    ranks: Ranks
    max_tokens: int

    def answers(
        self, prompts: Sequence[Prompt], samplings: Sequence[Sampling], check: Callable[[], None]
    ) -> list[Answer]:
        """As many answers to each prompt as its sampling says; Stopped on all ranks when it is on one."""
        first = np.cumsum([0, *(s.n for s in samplings)]).tolist()
        mine = range(self.ranks.rank, len(prompts), self.ranks.size)
        table = torch.zeros(first[-1] + 1, 2 + len(self.judges) + 2 * self.max_tokens, dtype=torch.float64)
        try:
            found = iter(self.rollout([prompts[i].ids for i in mine], [samplings[i] for i in mine], check))
        except Stopped:
            table[-1, 0] = 1
        else:
            for i in mine:
                for number in range(first[i], first[i + 1]):
                    row = self._row(prompts[i], next(found))
                    table[number, : len(row)] = torch.tensor(row, dtype=torch.float64)
        *rows, last = self.ranks.sum_(table).tolist()  # ids and float32 are exact in float64
        if last[0]:
            raise Stopped
        return [self._answer(p, row) for i, p in enumerate(prompts) for row in rows[first[i] : first[i + 1]]]

    def total(self, answers: Sequence[Answer]) -> Floats:
        """The weighted sum of each answer's rewards."""
        return np.array([a.rewards for a in answers]) @ np.array([j.weight for j in self.judges.values()])

    def _row(self, prompt: Prompt, completion: Completion) -> list[float]:
        if completion.finish_reason == "error":
            raise CheckFailed(f"an answer of the model under training failed: {completion.error}")
        ids = completion.token_ids
        rewards = [judge.reward(prompt, completion) for judge in self.judges.values()]
        logprobs = [token.logprob for token in completion.logprobs or ()]
        room = [0.0] * (self.max_tokens - len(ids))
        return [len(ids), completion.finish_reason == "length", *rewards, *ids, *room, *logprobs]

    def _answer(self, prompt: Prompt, row: Sequence[float]) -> Answer:
        size, first = int(row[0]), 2 + len(self.judges)
        second = first + self.max_tokens
        ids = tuple(int(i) for i in row[first : first + size])
        return Answer(prompt, ids, tuple(row[second : second + size]), tuple(row[2:first]), bool(row[1]))


def advantages(rewards: Floats, group: int, kind: Comparison) -> tuple[Floats, NDArray[np.bool_]]:
    """How much better than its group each answer is; whether all rewards of its group are the same.

    GRPO (2402.03300) divides by the group's standard deviation, Dr. GRPO (2503.20783) does not.
    """
    groups = rewards.reshape(-1, group)
    apart = groups - groups.mean(axis=1, keepdims=True)
    flat = np.ptp(groups, axis=1, keepdims=True) < _FLAT
    scale = np.where(flat, 1.0, groups.std(axis=1, keepdims=True)) if kind == "std" else 1.0
    return np.where(flat, 0.0, apart / scale).ravel(), np.broadcast_to(flat, groups.shape).ravel()
