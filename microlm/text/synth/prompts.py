"""Prompts that a teacher answers anew. Enters: conversations, pairs, extraction; leaves: items in order.

A conversation is asked up to its last turn that is not the assistant's; what was answered then is not read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from microlm.core.client import ChatReply
from microlm.core.records import Conversation, Extraction, Message, Preference
from microlm.text import extraction, sources
from microlm.text.dedup import DigestSet
from microlm.text.read import Drop, Fault, Record, shown
from microlm.text.sources import Source
from microlm.text.sources.marked import answer_text
from microlm.text.sources.shapes import parse_object
from microlm.text.sources.turns import dialogue
from microlm.text.synth.check import require_finished
from microlm.text.synth.items import UNREAD, Item, Skipped, request_digest
from microlm.text.synth.recipe import Prompts, SynthRecipe, Template
from microlm.text.synth.templates import require_utf8

OTHER_TASK = "other_task"


def walk(recipe: SynthRecipe, asks: Prompts, source: Source) -> Iterator[Item | Skipped]:
    """The prompts of a file, each as often as `draw.samples` says."""
    numbers, asked = itertools.count(), DigestSet()
    for block in sources.blocks(source):
        for place, data in block.objects():
            record = data if isinstance(data, Drop) else _read(data, place)
            if isinstance(record, Drop):
                yield Skipped(next(numbers), place, UNREAD, record.reason, record.detail)
            elif not sources.is_task(task := _task(record)):
                detail = f"task {shown(task)!r} cannot name a token set"
                yield Skipped(next(numbers), place, UNREAD, "bad_task", detail)
            elif asks.tasks and task not in asks.tasks:
                yield Skipped(next(numbers), place, task, OTHER_TASK, f"task '{task}' is not asked")
            else:
                yield from _items(recipe, asks, place, record, asked, numbers)


def _read(data: Mapping[str, Any], place: str) -> Record | Drop:
    """A conversation whether it is answered or not, a bare `prompt`, or a record of another shape."""
    turns = data.get("conversations") if data.get("messages") is None else data["messages"]
    if turns is None and "chosen" not in data and isinstance(data.get("prompt"), str):
        turns = [{"role": "user", "content": data["prompt"]}]
    if turns is None:
        return parse_object(data, place)
    task = data.get("task", "chat")
    try:
        if not isinstance(task, str):
            raise Fault("bad_task", f"'task' is {type(task).__name__}, expected a string")
        messages, tools = dialogue(turns, data)
    except Fault as fault:
        return Drop(fault.reason, place, fault.detail)
    return Conversation(messages, task, place, "", tools)


def _items(
    recipe: SynthRecipe,
    asks: Prompts,
    place: str,
    record: Record,
    asked: DigestSet,
    numbers: Iterator[int],
) -> Iterator[Item | Skipped]:
    task = _task(record)
    turns = _prompt(record)
    if not turns:
        detail = "no turn of it waits for an answer"
        yield Skipped(next(numbers), place, task, "no_prompt", detail)
        return
    if asks.system and turns[0].role != "system":
        turns = (Message("system", asks.system), *turns)
    template = Template.model_validate({"name": task, "task": task, "prompt": "-", "unique_answers": False})
    tools = record.tools if isinstance(record, Conversation | Preference) else ()
    if not asked.add(request_digest(turns, template, tools)):
        yield Skipped(next(numbers), place, task, "duplicate_prompt", turns[-1].content[:60], turns)
        return
    samples = recipe.draw.samples
    for sample in range(samples):
        name = f"{place}/{sample}" if samples > 1 else place
        yield Item(next(numbers), name, template, {"licence": ""}, turns, tools)


def _task(record: Record) -> str:
    """What the answer is to teach."""
    if isinstance(record, Conversation | Preference):
        return record.task
    return "extraction" if isinstance(record, Extraction) else "chat"


def _prompt(record: Record) -> tuple[Message, ...]:
    """The turns that wait for an answer, none where there are none."""
    if isinstance(record, Extraction):
        return (Message("user", extraction.prompt(record.text, record.allowed, record.lang)),)
    if isinstance(record, Preference):
        return record.prompt
    if not isinstance(record, Conversation):
        return ()
    last = max((n for n, m in enumerate(record.messages) if m.role in ("user", "tool")), default=-1)
    return record.messages[: last + 1]


def taught(reply: ChatReply, keep_thinking: bool) -> str:
    """A teacher's whole answer as a text with marks: thinking (perhaps), words, calls; raises Fault."""
    require_finished(reply)
    choices: list[Mapping[str, Any]] = reply.raw["choices"]
    [message], _ = dialogue([{**choices[0]["message"], "role": "assistant"}], {})
    said = replace(message, content=message.content.strip())
    if said.content.startswith("<think>") or "</think>" in said.content:
        raise Fault(
            "unmatched_thinking", "a mark of thinking has no partner, so the answer is not told apart"
        )
    return require_utf8(answer_text(said if keep_thinking else replace(said, reasoning="")))
