"""What became of every conversation asked for. Enters: items with their answers, in the order of the plan.

Leaves: conversations/train.jsonl, requests.jsonl (who was asked what, and why it was dropped), counts.json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import IO, Any, Self

from microlm.core.artifact import Workspace
from microlm.core.errors import UserError
from microlm.core.records import Conversation, Message, to_json
from microlm.text.dedup import DigestSet
from microlm.text.read import Fault
from microlm.text.sources.marked import parse_answer
from microlm.text.synth.check import check_json
from microlm.text.synth.items import Item, Skipped, conversation_digest, said_digest
from microlm.text.synth.journal import Answer
from microlm.text.synth.plan import Plan

CONVERSATIONS, REQUESTS, COUNTS = "conversations/train.jsonl", "requests.jsonl", "counts.json"
MAX_EXAMPLES = 3


class Writer:
    """Writes each item as a conversation or as a drop, and counts it."""

    def __init__(self, work: Workspace, plan: Plan) -> None:
        self._work, self._plan = work, plan
        self._said, self._answers = DigestSet(), DigestSet()
        self._asked: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._teachers: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        self._files = ExitStack()

    def __enter__(self) -> Self:
        self._conversations = self._open(CONVERSATIONS)
        self._requests = self._open(REQUESTS)
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def write(self, item: Item | Skipped, answer: Answer | None) -> None:
        """One item: its conversation if it is fit, and in any case its request."""
        name = item.template if isinstance(item, Skipped) else item.template.name
        self._asked[name] += 1
        reason, record = "", None
        try:
            if isinstance(item, Skipped):
                raise Fault(item.reason, item.detail)
            conversation = self._conversation(item, answer)
            self._require_new(item, conversation)
            record = self._accepted.total()
            self._accepted[name] += 1
            self._work.licences.update({conversation.licence} - {""})
            _write_line(self._conversations, to_json(conversation))
        except Fault as fault:
            reason = fault.reason
            self._dropped[reason] += 1
            examples = self._examples.setdefault(reason, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append(f"{item.id}: {fault.detail}")
        head = {"id": item.id, "template": name, "record": record, "reason": reason}
        _write_line(self._requests, head | self._provenance(item, answer))

    def finish(self) -> None:
        """Write the counts; an error when nothing was accepted."""
        asked, accepted = self._asked.total(), self._accepted.total()
        if not accepted:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._dropped.most_common(3))
            example = next(iter(self._examples.values()), ["there were no seeds"])[0]
            raise UserError(
                f"synth: nothing is left of {asked} conversations ({reasons or 'no seeds'}); first: {example}"
            )
        counts = {"asked": asked, "accepted": accepted, "dropped": dict(sorted(self._dropped.items()))}
        self._work.metrics.update(counts, tokens=dict(self._tokens))
        if self._teachers:
            self._work.metrics["teachers"] = dict(self._teachers)
        rows = {n: {"asked": self._asked[n], "accepted": self._accepted[n]} for n in sorted(self._asked)}
        more = {"repeated_attempts": dict(sorted(self._faults.items())), "templates": rows}
        self._work.write_json(COUNTS, counts | more)
        self._work.write_json("logs/drops.json", self._examples)

    def _open(self, name: str) -> IO[str]:
        path = self._work.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return self._files.enter_context(path.open("w", encoding="utf-8", newline="\n"))

    def _conversation(self, item: Item, answer: Answer | None) -> Conversation:
        """What is kept of an item; raises Fault."""
        template = item.template
        if template.answer is not None:
            return self._made(item, item.messages, self._plan.text(item.id, item.fields, template.answer))
        assert answer is not None, "every open item has been asked"
        if answer.reason:
            raise Fault(answer.reason, answer.detail)
        if self._plan.recipe.prompts is not None:
            self._teachers[answer.asked_model] += 1
            return self._conversation_of(item, item.messages, parse_answer(answer.text))
        if template.result is None:
            return self._made(item, item.messages, answer.text)
        schema = template.json_schema
        reply = answer.text if schema is None else check_json(answer.text, schema)
        fields = {**item.fields, "reply": reply}
        turns = self._plan.turns(item.id, fields, template.result.system, template.result.prompt)
        return self._made(item, turns, self._plan.text(item.id, fields, template.result.answer))

    def _made(self, item: Item, turns: tuple[Message, ...], answer: str) -> Conversation:
        if not answer:
            raise Fault("empty_answer", "the answer is empty once its fields are filled in")
        own = item.fields.get("licence", item.fields.get("license"))
        licence = self._plan.recipe.licence or (own if isinstance(own, str) else "")
        return self._conversation_of(item, turns, Message("assistant", answer), licence)

    def _conversation_of(
        self, item: Item, turns: tuple[Message, ...], answer: Message, licence: str = ""
    ) -> Conversation:
        told = licence or self._plan.recipe.licence
        return Conversation((*turns, answer), item.template.task, f"synth:{item.id}", told, item.tools)

    def _require_new(self, item: Item, conversation: Conversation) -> None:
        template = item.template
        if not self._said.add(conversation_digest(conversation)):
            raise Fault("duplicate_conversation", conversation.messages[-1].content[:60])
        if template.answer is None and template.unique_answers:
            said = conversation.messages[-1].content
            if not self._answers.add(said_digest(f"{template.name}\ue000{said}")):
                raise Fault("duplicate_answer", said[:60])

    def _provenance(self, item: Item | Skipped, answer: Answer | None) -> dict[str, Any]:
        """Who was asked what, how, and what came back."""
        row: dict[str, Any] = {"messages": [to_json(m) for m in item.messages]}
        if answer is None:
            return row
        self._faults.update(answer.faults)
        self._tokens.update(answer.usage or {})
        draw = self._plan.recipe.draw.model_dump(mode="json", exclude={"samples", "attempts"})
        return row | {
            "answer": answer.text,
            "model": answer.asked_model,
            "served_model": answer.model,
            "sampling": {**draw, "seed": answer.seed},
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
            "repeated_for": answer.faults,
        }


def _write_line(file: IO[str], row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
