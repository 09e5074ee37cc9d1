"""Answers of the model under training: drawn, judged, compared within their group, packed into rows.

Shapes: R rows, T tokens of context, M figures that are told of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microlm.core.errors import CheckFailed
from microlm.core.records import Completion, Sampling
from microlm.train.batches.batch import IGNORE, NO_TRUNK, Batch
from microlm.train.batches.prompts import CanJudge, Prompt, any_gold
from microlm.train.ranks import Ranks, Stopped

Rollout = Callable[[Sequence[Sequence[int]], Sequence[Sampling], Callable[[], None]], list[Completion]]
"""`(ids of prompts, how each is answered, check) → sampling.n completions for each`, by the weights of now.

`check` is called between tokens; what it raises ends the answering.
"""
Reward = Callable[[Prompt, Completion], float]
"""How good an answer is, from 0 to 1 (right)."""
Comparison = Literal["std", "mean"]
Floats = NDArray[np.float64]
NAME = "prompts"
_FLAT = 1e-9  # rewards that are closer are the same


class Judge(NamedTuple):
    """A reward, its part in the sum that is trained on, and which gold answers it can judge by."""

    weight: float
    reward: Reward
    can_judge: CanJudge = any_gold


@dataclass(frozen=True, slots=True)
class Answer:
    """Ids (EOS included), the engine's log-probability of each, every judge's reward, how it ended."""

    prompt: Prompt
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rewards: tuple[float, ...]
    truncated: bool


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


def pack(
    answers: Sequence[Answer], each: Mapping[str, Floats], told: Floats, shape: tuple[int, int]
) -> Batch:
    """Answers as segments of rows that go on from their prompt, which lies there once for several of them.

    `shape`: context, rows of a micro-batch. Extras: `each` figure of an answer at its labels [R,T], `engine`
    (its log-probability there) [R,T], and the rows' sums of what is `told`, [R,M].
    """
    context, micro_rows = shape
    units = share_prompts(answers, context)
    rows = fill([size_of(answers, unit) for unit in units], context)
    count = -(-len(rows) // micro_rows) * micro_rows
    page = _Page(count, context, (*each, "engine"))
    sums = np.zeros((count, told.shape[1]))
    samples: list[tuple[tuple[str, int], ...]] = [()] * count
    for r, members in enumerate(rows):
        here = [i for unit in members for i in units[unit]]
        samples[r] = tuple((NAME, answers[i].prompt.number) for i in here)
        sums[r] = told[here].sum(axis=0)
        for unit in members:
            page.begin(r, answers[units[unit][0]].prompt.ids)
            for i in units[unit]:
                figures_of_it = {name: values[i] for name, values in each.items()}
                page.add(r, answers[i], figures_of_it)
    return page.batch(tuple(samples), torch.from_numpy(sums))


def share_prompts(answers: Sequence[Answer], room: int) -> list[list[int]]:
    """Numbers of neighbours that answer the same prompt, as many together as have room behind it."""
    units: list[list[int]] = []
    for i, answer in enumerate(answers):
        last = units[-1] if units else []
        same = last and answers[last[0]].prompt is answer.prompt
        if same and size_of(answers, [*last, i]) <= room:
            last.append(i)
        else:
            units.append([i])
    return units


def size_of(answers: Sequence[Answer], unit: Sequence[int]) -> int:
    """Positions that a prompt and the answers to it fill; its last token stands before each of them."""
    return len(answers[unit[0]].prompt.ids) - 1 + sum(len(answers[i].ids) for i in unit)


class _Page:
    """Rows that are being filled from left to right, [R,T]."""

    def __init__(self, rows: int, context: int, figures: Sequence[str]) -> None:
        size = (rows, context)
        self._ids, self._labels = np.zeros(size, np.int64), np.full(size, IGNORE, np.int64)
        self._segments, self._trunks = np.full(size, -1, np.int64), np.full(size, NO_TRUNK, np.int64)
        self._positions = np.zeros(size, np.int64)
        self._extras = {name: np.zeros(size) for name in figures}
        self._at, self._count = [0] * rows, [0] * rows
        self._prompt: tuple[int, ...] = ()
        self._trunk = NO_TRUNK

    def begin(self, row: int, prompt: tuple[int, ...]) -> None:
        """Write a prompt but for its last token; what is added goes on from there."""
        self._prompt, self._trunk = prompt, self._count[row]
        self._write(row, prompt[:-1], 0, NO_TRUNK)

    def add(self, row: int, answer: Answer, figures: Mapping[str, float]) -> None:
        """Write an answer behind the prompt's last token: each position has the next token as its label."""
        here = self._write(row, (self._prompt[-1], *answer.ids[:-1]), len(self._prompt) - 1, self._trunk)
        self._labels[row, here] = answer.ids
        self._extras["engine"][row, here] = answer.logprobs
        for name, value in figures.items():
            self._extras[name][row, here] = value

    def batch(self, samples: tuple[tuple[tuple[str, int], ...], ...], told: Tensor) -> Batch:
        """The tensors."""
        places = {"trunk": self._trunks, "positions": self._positions}
        tensors = {name: torch.from_numpy(extra) for name, extra in (self._extras | places).items()}
        ids, labels, segments = map(torch.from_numpy, (self._ids, self._labels, self._segments))
        return Batch(ids, labels, segments, samples, {**tensors, "told": told})

    def _write(self, row: int, ids: Sequence[int], first: int, trunk: int) -> slice:
        here = slice(self._at[row], self._at[row] + len(ids))
        self._ids[row, here], self._segments[row, here] = ids, self._count[row]
        self._positions[row, here] = np.arange(first, first + len(ids))
        self._trunks[row, here] = trunk
        self._at[row], self._count[row] = here.stop, self._count[row] + 1
        return here


def fill(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Which sizes go into which row: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        row = next((r for r, free in enumerate(left) if free >= sizes[i]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(i)
        left[row] -= sizes[i]
    return rows
