"""Our template, ChatML: one walk over a conversation gives text, ids and loss mask; Jinja says the same.

A turn is `<|im_start|>role`, a line end, its words and `<|im_end|>`, then a line end. Thinking, tools and
calls are written as Hermes and Qwen2.5 do it; nothing is dropped later: a prompt begins what follows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Message
from microlm.text.sources.marked import TOOLS_SECTION, call_text
from microlm.text.tokenizer import END, MARKS, START, Tokenizer

_THINK, _THOUGHT, _CALL, _CALLED, _RESPONSE, _RESPONDED = MARKS
_HEAD, _TAIL = TOOLS_SECTION
_IN_TAIL = re.compile(f"({'|'.join(map(re.escape, MARKS))})")
_NAME = re.compile(r"[^\s\"'\\{}%<>|](?:[^\n\"'\\{}%<>|]{0,62}[^\s\"'\\{}%<>|])?")
_FIRST_LINE = re.compile(r'\{%- set default_system = "([^"\\]*)" %\}')
_JINJA = """{%- set default_system = @DEFAULT@ %}
{%- if messages and messages[0].role == 'system' %}
    {%- set system = messages[0].content or '' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = default_system %}
    {%- set turns = messages %}
{%- endif %}
{%- if system or tools or turns != messages %}
    {{- '<|im_start|>system\\n' }}{{- system }}
    {%- if tools %}
        {{- '\\n\\n' if system else '' }}{{- @HEAD@ }}
        {%- for tool in tools %}
            {{- '' if loop.first else '\\n' }}{{- tool | tojson }}
        {%- endfor %}
        {{- @TAIL@ }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in turns %}
    {{- '<|im_start|>' }}{{- message.role }}{{- '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- set thought = message.reasoning_content or message.reasoning %}
            {%- if thought %}
                {{- '<think>\\n' }}{{- thought }}{{- '\\n</think>\\n\\n' }}
            {%- endif %}
            {{- message.content or '' }}
            {%- for tool_call in message.tool_calls or [] %}
                {%- set call = tool_call.function or tool_call %}
                {{- '' if loop.first and not message.content else '\\n' }}
                {{- '<tool_call>\\n{"name": ' }}{{- call.name | tojson }}{{- ', "arguments": ' }}
                {%- if call.arguments is string %}
                    {{- call.arguments }}
                {%- else %}
                    {{- call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<tool_response>\\n' }}{{- message.content or '' }}{{- '\\n</tool_response><|im_end|>' }}
    {%- else %}
        {{- message.content or '' }}{{- '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


class Part(NamedTuple):
    """A piece of the walk: a control token or text; `learn` when it is the assistant's."""

    text: str
    control: bool
    learn: bool


class _Run(NamedTuple):
    """A control token's id, or a text with the bytes at its beginning that are not to be learnt."""

    id: int | None
    text: str
    given: int | None


@dataclass(frozen=True, slots=True)
class ChatML:
    """The template, with the system turn of conversations that have none (empty: they stay without)."""

    default_system: str = ""

    @classmethod
    def named(cls, assistant_name: str | None) -> ChatML:
        """The template of a model with a name; without one there is no default system turn."""
        if assistant_name is None:
            return cls()
        if not _NAME.fullmatch(assistant_name) or not assistant_name.isprintable():
            raise UserError(
                f"assistant_name {assistant_name!r}: write 1 to 64 printable characters without "
                "quotes, backslashes, braces, %, |, < and >"
            )
        return cls(f"You are {assistant_name}, a helpful assistant.")

    @classmethod
    def read(cls, source: str) -> ChatML | None:
        """The template that a Jinja text is the form of, or None when it is not ours."""
        first = _FIRST_LINE.match(source)
        found = cls(first[1]) if first else None
        return found if found and found.source == source.rstrip("\n") else None

    @property
    def source(self) -> str:
        """The Jinja form, as a model's directory carries it."""
        text = _JINJA.replace("@DEFAULT@", f'"{self.default_system}"')
        return text.replace("@HEAD@", _quoted(_HEAD)).replace("@TAIL@", _quoted(_TAIL))

    def turns(self, chat: Conversation) -> tuple[Message, ...]:
        """The messages as turns: with the system turn that stands first for the default or for tools."""
        if chat.messages and chat.messages[0].role == "system":
            return chat.messages
        if not (self.default_system or chat.tools):
            return chat.messages
        return (Message("system", self.default_system), *chat.messages)

    def render(self, chat: Conversation, generation_prompt: bool = False) -> str:
        """The conversation as one string."""
        return "".join(part.text for part in self._parts(chat, generation_prompt))

    def ids(self, tokenizer: Tokenizer, chat: Conversation, generation_prompt: bool) -> list[int]:
        """Ids of one conversation."""
        runs = _runs(self._parts(chat, generation_prompt), tokenizer.control)
        return [i for run in runs for i in (tokenizer.encode(run.text) if run.id is None else [run.id])]

    def encode(
        self, tokenizer: Tokenizer, chats: Sequence[Conversation]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Ids and mask of each conversation; all their texts are encoded in one batch."""
        runs = [list(_runs(self._parts(chat), tokenizer.control)) for chat in chats]
        texts = list(dict.fromkeys(run.text for chat in runs for run in chat if run.id is None))
        encoded = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
        for chat in runs:
            ids: list[int] = []
            mask: list[int] = []
            for number, text, given in chat:
                some = encoded[text] if number is None else [number]
                given_ids = len(some) if given is None else _count_given(tokenizer, some, given)
                ids += some
                mask += [0] * given_ids + [1] * (len(some) - given_ids)
            yield ids, mask

    def _parts(self, chat: Conversation, generation_prompt: bool = False) -> Iterator[Part]:
        """The walk: all there is of a conversation, in order."""
        for number, message in enumerate(self.turns(chat)):
            yield Part(START, True, False)
            if message.role == "assistant":
                yield Part("assistant\n", False, False)
                yield from _answer(message)
                yield Part(END, True, True)
            else:
                yield from _asked(message, chat.tools if number == 0 else ())
                yield Part(END, True, False)
            yield Part("\n", False, False)
        if generation_prompt:
            yield Part(START, True, False)
            yield Part("assistant\n", False, False)


def _quoted(text: str) -> str:
    """A literal of Jinja."""
    assert "'" not in text and "\\" not in text, "the sections of tools hold neither"
    return "'" + text.replace("\n", "\\n") + "'"


def _asked(message: Message, tools: Sequence[str]) -> Iterator[Part]:
    """Role and words of a turn that is not the assistant's."""
    if message.role == "tool":
        yield Part("tool\n", False, False)
        yield Part(_RESPONSE, True, False)
        yield Part(f"\n{message.content}\n", False, False)
        yield Part(_RESPONDED, True, False)
        return
    yield Part(f"{message.role}\n{message.content}", False, False)
    if message.role == "system" and tools:
        lines = "\n".join(tools)
        yield Part(("\n\n" if message.content else "") + _HEAD + lines, False, False)
        yield from (Part(text, text in MARKS, False) for text in _IN_TAIL.split(_TAIL) if text)


def _answer(message: Message) -> Iterator[Part]:
    """What the assistant thinks, says and calls."""
    if message.reasoning:
        yield Part(_THINK, True, True)
        yield Part(f"\n{message.reasoning}\n", False, True)
        yield Part(_THOUGHT, True, True)
        yield Part(f"\n\n{message.content}", False, True)
    elif message.content:
        yield Part(message.content, False, True)
    for number, call in enumerate(message.tool_calls):
        if number or message.content:
            yield Part("\n", False, True)
        yield Part(_CALL, True, True)
        yield Part(f"\n{call_text(call)}\n", False, True)
        yield Part(_CALLED, True, True)


def _runs(parts: Iterable[Part], control: Mapping[str, int]) -> Iterator[_Run]:
    """Control tokens that the tokenizer has, and between them the texts that are encoded as one."""
    text, given = "", None
    for part in parts:
        number = control.get(part.text) if part.control else None
        if number is None:
            if part.learn and given is None:
                given = len(text.encode())
            text += part.text
            continue
        if text:
            yield _Run(None, text, given)
            text, given = "", None
        yield _Run(number, part.text, 0 if part.learn else None)
    if text:
        yield _Run(None, text, given)


def _count_given(tokenizer: Tokenizer, ids: Sequence[int], size: int) -> int:
    """How many of the first ids hold nothing but the first `size` bytes."""
    if size == 0:
        return 0
    covered = 0
    for count, token_id in enumerate(ids):
        covered += len(tokenizer.token_bytes[token_id])
        if covered > size:
            return count
    return len(ids)
