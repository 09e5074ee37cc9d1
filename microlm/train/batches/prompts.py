"""A data artifact's conversations → questions for the model, each with the answer that the data gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from microlm.core.errors import UserError
from microlm.core.recipe import nearest
from microlm.core.records import Conversation, Message
from microlm.text.chat import chat_ids
from microlm.text.tokenizer import Tokenizer

NO_QUESTION, TOO_LONG = "without a user's turn", "longer than the context allows"
NO_GOLD = "without a gold answer that a reward can judge by"
CanJudge = Callable[[str], bool]
"""Whether a reward finds in a gold answer what it judges by."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The conversation up to its last user turn, its ids with the answer's turn opened, what followed.

    `number`: of the conversation in its file, from 0.
    """

    asked: Conversation
    ids: tuple[int, ...]
    gold: str
    number: int = 0


@dataclass(frozen=True)
class Prompts:
    """What can be asked, and by reason how many conversations cannot be."""

    asked: Sequence[Prompt]
    dropped: dict[str, int]


def any_gold(gold: str) -> bool:
    """Of a reward that needs no gold answer."""
    return True


def make_prompts(
    chats: Iterable[Conversation],
    tasks: Collection[str],
    tokenizer: Tokenizer,
    longest: int,
    can_judge: CanJudge = any_gold,
    most: int | None = None,
) -> Prompts:
    """The questions of some tasks (none named: all) that can be judged; of at most `longest` ids each.

    `most`: no more than so many of the first ones.
    """
    made: list[Prompt] = []
    known: set[str] = set()
    dropped: Counter[str] = Counter()
    for number, chat in enumerate(chats):
        if len(made) == most:
            break
        known.add(chat.task)
        if tasks and chat.task not in tasks:
            continue
        parts = split(chat)
        if parts is None:
            dropped[NO_QUESTION] += 1
            continue
        if not can_judge(parts[1]):
            dropped[NO_GOLD] += 1
            continue
        ids = chat_ids(tokenizer, parts[0], generation_prompt=True)
        if len(ids) > longest:
            dropped[TOO_LONG] += 1
        else:
            made.append(Prompt(parts[0], tuple(ids), parts[1], number))
    for task in set(tasks) - known:
        raise UserError(f"tasks: the data holds no conversations of '{task}'; {nearest(task, known)}")
    if not made:
        why = "; ".join(f"{count} are {reason}" for reason, count in dropped.items()) or "there are none"
        longer = "raise loop.context, or lower answers.max_tokens"
        help_ = longer if dropped[TOO_LONG] else "choose other tasks, or rewards that can judge them"
        raise UserError(f"data: no conversation can be asked ({why}); {help_}")
    return Prompts(made, dict(dropped))


def split(chat: Conversation) -> tuple[Conversation, str] | None:
    """The conversation up to the last user turn, and the last thing that the assistant then says."""
    turns = chat.messages
    last = max((i for i, m in enumerate(turns) if m.role == "user"), default=None)
    if last is None:
        return None
    said: list[Message] = [m for m in turns[last + 1 :] if m.role == "assistant"]
    return replace(chat, messages=turns[: last + 1]), said[-1].content if said else ""
