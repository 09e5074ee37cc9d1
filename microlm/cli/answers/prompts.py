"""A file of prompts, line by line. Enters: JSON; leaves: checked lines, or a sentence with its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict

from microlm.core.errors import UserError
from microlm.core.payload import constraint_of
from microlm.core.recipe import Recipe, build
from microlm.core.records import Constraint, Conversation, Message, Sampling

Whole = Annotated[int, Strict()]  # true is no number
Real = Annotated[float, Strict()]
_KEPT = ("id", "prompt", "messages", "meta")
_SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "ignore_eos", "logprobs", "n",
)  # fmt: skip


class ConstraintLine(Recipe):
    """What an answer must be: one of these, and `copy_from` beside it or alone."""

    json_schema: dict[str, Any] | None = Field(None, description="a JSON schema")
    json_object: bool = Field(False, description="any JSON object")
    regex: str | None = Field(None, description="a pattern of the whole answer")
    choice: list[str] | None = Field(None, min_length=1, description="the answers that are allowed")
    grammar: str | None = Field(None, description="a grammar in the Lark form")
    copy_from: str | None = Field(None, description="a text; free texts of the answer are parts of it")
    copy_words: bool = Field(False, description="a copy begins and ends where words do")

    def constraint(self) -> Constraint | None:
        """The record."""
        schema = None if self.json_schema is None else json.dumps(self.json_schema, ensure_ascii=False)
        return constraint_of(**self.model_dump() | {"json_schema": schema})


class Line(Recipe):
    """A line: its prompt (or the messages of a chat), what is repeated in its answer, its own settings."""

    prompt: str | None = Field(None, description="a text")
    messages: list[dict[str, Any]] | None = Field(None, description="OpenAI's {role, content}")
    tools: list[dict[str, Any]] | None = Field(None, description="what may be called, beside messages")
    id: Any = Field(None, description="repeated in the answer")
    meta: Any = Field(None, description="anything else that is repeated in the answer")
    max_tokens: Whole | None = Field(None, description="new tokens at most")
    temperature: Real | None = Field(None, description="0 is greedy")
    top_p: Real | None = Field(None, description="share of the mass")
    top_k: Whole | None = Field(None, description="how many of the likeliest")
    min_p: Real | None = Field(None, description="least share of the likeliest")
    repetition_penalty: Real | None = Field(None, description="above 1: less of what was said")
    presence_penalty: Real | None = Field(None, description="less of what the answer holds")
    frequency_penalty: Real | None = Field(None, description="the same, for each time")
    logit_bias: dict[int, float] | None = Field(None, description="added scores by token id")
    seed: Whole | None = Field(None, description="of the draws; else the command's and the line number")
    stop: str | list[str] | None = Field(None, description="texts that end the answer")
    ignore_eos: bool | None = Field(None, description="go on after the end")
    logprobs: Whole | None = Field(None, description="so many likeliest tokens beside each")
    n: Whole | None = Field(None, description="answers to this prompt")
    constraint: ConstraintLine | None = Field(None, description="what the answer must be; null: free")
    adapter: str | None = Field(None, description="one of --adapter NAME=DIR; null: none")

    def keep(self) -> dict[str, Any]:
        """What stands in the answer's row again."""
        return {name: getattr(self, name) for name in _KEPT if name in self.model_fields_set}

    def sampling(self, base: Sampling, number: int) -> Sampling:
        """The settings of the command, and this line's over them."""
        own: dict[str, Any] = {k: v for k in _SAMPLING if (v := getattr(self, k)) is not None}
        if base.seed is not None:
            own.setdefault("seed", (base.seed + number) % 2**63)
        if self.stop is not None:
            own["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.logit_bias is not None:
            own["logit_bias"] = tuple(self.logit_bias.items())
        if "constraint" in self.model_fields_set:
            own["constraint"] = self.constraint.constraint() if self.constraint else None
        return replace(base, **own)

    def asked(self, chat: bool) -> str | Conversation:
        """The prompt as the engine takes it; messages, and with `chat` texts too, go through the template."""
        from microlm.text.sources.turns import dialogue

        if self.messages is not None:
            messages, tools = dialogue(self.messages, {"tools": self.tools})
            return Conversation(messages, tools=tools)
        assert self.prompt is not None
        return Conversation((Message("user", self.prompt),)) if chat else self.prompt


def read_prompts(path: Path) -> Iterator[tuple[str, str, Line]]:
    """The lines that are not empty: (place as file:line, digest of its bytes, the line)."""
    for number, raw in enumerate(_raw_lines(path), 1):
        if raw.strip():
            place = f"{path}:{number}"
            yield place, hashlib.sha256(raw.strip()).hexdigest()[:16], _parse(raw, place)


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file):
                yield raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else raw
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check the path") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _parse(raw: bytes, place: str) -> Line:
    from microlm.text.read import Fault

    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as e:
        raise UserError(f"{place}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError):
        raise UserError(f'{place}: not valid JSON; expected {{"prompt": "…"}}') from None
    has = [key for key in ("prompt", "messages") if isinstance(value, dict) and value.get(key) is not None]
    if len(has) != 1 or (has == ["prompt"] and not isinstance(value["prompt"], str)):
        found = "both 'prompt' and 'messages'" if len(has) == 2 else "no 'prompt' with a text"
        raise UserError(f'{place}: {found}; expected {{"prompt": "…"}} or {{"messages": […]}}')
    line = build(Line, value, place)
    try:
        line.asked(chat=False)
    except Fault as fault:
        raise UserError(f"{place}: {fault.detail}; expected OpenAI's {{role, content}}") from None
    return line
