"""Our template, ChatML: one walk over a conversation gives text, ids and loss mask; Jinja says the same.

A turn is `<|im_start|>role`, a line end, its words and `<|im_end|>`, then a line end. Thinking, tools and
calls are written as Hermes and Qwen2.5 do it; nothing is dropped later: a prompt begins what follows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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


Part = tuple[str, bool, bool]
"""A piece of the walk: its text, whether that is a control token, whether it is the assistant's to learn."""
_Run = tuple[int | None, str, int | None]
"""An id and its token, or None and a text; then how many bytes of it are not learnt (None: all)."""
_OPEN: Part = (START, True, False)
_ANSWERS: Part = ("assistant\n", False, False)
_CLOSE: Part = (END, True, False)
_CLOSE_ANSWER: Part = (END, True, True)
_NEWLINE: Part = ("\n", False, False)


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
        return "".join(text for text, _, _ in self._parts(chat, generation_prompt))

    def ids(self, tokenizer: Tokenizer, chat: Conversation, generation_prompt: bool) -> list[int]:
        """Ids of one conversation."""
        runs = _runs(self._parts(chat, generation_prompt), tokenizer.control)
        parts = (tokenizer.encode(text) if number is None else [number] for number, text, _ in runs)
        return [i for ids in parts for i in ids]

    def encode(
        self, tokenizer: Tokenizer, chats: Sequence[Conversation]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Ids and mask of each conversation; all their texts are encoded in one batch."""
        runs = [list(_runs(self._parts(chat), tokenizer.control)) for chat in chats]
        texts = list(dict.fromkeys(text for chat in runs for number, text, _ in chat if number is None))
        encoded = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
        for chat in runs:
            ids: list[int] = []
            mask: list[int] = []
            for number, text, given in chat:
                if number is not None:
                    ids.append(number)
                    mask.append(int(given is not None))
                    continue
                some = encoded[text]
                given_ids = len(some) if given is None else _count_given(tokenizer, some, given)
                ids += some
                mask += [0] * given_ids + [1] * (len(some) - given_ids)
            yield ids, mask

    def _parts(self, chat: Conversation, generation_prompt: bool = False) -> Iterator[Part]:
        """The walk: all there is of a conversation, in order."""
        tools = chat.tools
        for message in self.turns(chat):
            yield _OPEN
            if message.role == "assistant":
                yield _ANSWERS
                yield from _answer(message)
                yield _CLOSE_ANSWER
            else:
                yield from _asked(message, tools)
                yield _CLOSE
            yield _NEWLINE
            tools = ()  # they stand in the first turn
        if generation_prompt:
            yield _OPEN
            yield _ANSWERS


def _quoted(text: str) -> str:
    """A literal of Jinja."""
    assert "'" not in text and "\\" not in text, "the sections of tools hold neither"
    return "'" + text.replace("\n", "\\n") + "'"


def _asked(message: Message, tools: Sequence[str]) -> Iterator[Part]:
    """Role and words of a turn that is not the assistant's."""
    if message.role == "tool":
        yield "tool\n", False, False
        yield _RESPONSE, True, False
        yield f"\n{message.content}\n", False, False
        yield _RESPONDED, True, False
        return
    yield f"{message.role}\n{message.content}", False, False
    if message.role == "system" and tools:
        lines = "\n".join(tools)
        yield ("\n\n" if message.content else "") + _HEAD + lines, False, False
        yield from ((text, text in MARKS, False) for text in _IN_TAIL.split(_TAIL) if text)


def _answer(message: Message) -> Iterator[Part]:
    """What the assistant thinks, says and calls."""
    if message.reasoning:
        yield _THINK, True, True
        yield f"\n{message.reasoning}\n", False, True
        yield _THOUGHT, True, True
        yield f"\n\n{message.content}", False, True
    elif message.content:
        yield message.content, False, True
    for number, call in enumerate(message.tool_calls):
        if number or message.content:
            yield "\n", False, True
        yield _CALL, True, True
        yield f"\n{call_text(call)}\n", False, True
        yield _CALLED, True, True


def _runs(parts: Iterable[Part], control: Mapping[str, int]) -> Iterator[_Run]:
    """Control tokens that the tokenizer has, and between them the texts that are encoded as one."""
    said, given = "", None
    for text, is_control, learn in parts:
        number = control.get(text) if is_control else None
        if number is None:
            if learn and given is None:
                given = len(said.encode())
            said += text
            continue
        if said:
            yield None, said, given
            said, given = "", None
        yield number, text, 0 if learn else None
    if said:
        yield None, said, given


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
