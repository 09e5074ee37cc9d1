"""A foreign template: Jinja of a model's directory. Enters: conversations; leaves: text, ids, mask.

The mask comes from `{% generation %}` marks, or from a prefix difference that is verified on the
conversation: what is written for an answer must follow, to the letter, what is written as its prompt.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Message, words_of
from microlm.text.chat.protection import Protection
from microlm.text.chat.sandbox import Compiled, TemplateFault
from microlm.text.chat.spelling import spelt
from microlm.text.tokenizer import Tokenizer

Span = tuple[int, int]
_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SHOWN_CHARS = 40


class Adopted:
    """The templates of a directory (`default`, perhaps `tool_use`), ready to render."""

    def __init__(self, sources: Mapping[str, str], special: Mapping[str, str], tokenizer: Tokenizer) -> None:
        self._where = tokenizer.path / "chat template"
        self._sources = dict(sources)
        self._special = dict(special)
        self._controls = re.compile(
            "|".join(re.escape(t) for t in sorted(tokenizer.control, key=len, reverse=True))
        )
        self._compiled = {name: self._compile(source) for name, source in sources.items()}

    def render(self, chat: Conversation, generation_prompt: bool = False) -> str:
        """The conversation as one string."""
        guard = Protection(chat, self._controls)
        return guard.restore(self._render(guard, len(chat.messages), generation_prompt)[0])

    def ids(self, tokenizer: Tokenizer, chat: Conversation, generation_prompt: bool) -> list[int]:
        """Ids of one conversation, whether its answers can be told or not."""
        guard = Protection(chat, self._controls)
        text, _ = self._render(guard, len(chat.messages), generation_prompt)
        return [i for ids in guard.encode(tokenizer, text) for i in ids]

    def encode(
        self, tokenizer: Tokenizer, chats: Sequence[Conversation]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Ids and mask of each conversation; raises UserError for one whose answers cannot be told."""
        for chat in chats:
            try:
                encoded = self._encode(tokenizer, chat)
            except UserError as error:
                raise UserError(f"{chat.source}: {error}" if chat.source else str(error)) from None
            yield encoded

    def _encode(self, tokenizer: Tokenizer, chat: Conversation) -> tuple[list[int], list[int]]:
        guard = Protection(chat, self._controls)
        text, spans = self._render(guard, len(chat.messages), False)
        if _MARKED.search(self._source(chat)):
            spans = self._closed(chat, text, spans)
        else:
            spans = self._by_prefixes(guard, chat, text)
        ids = [i for some in guard.encode(tokenizer, text) for i in some]
        return ids, self._mask(tokenizer, ids, guard, text, spans)

    def _source(self, chat: Conversation) -> str:
        return self._sources["tool_use" if chat.tools and "tool_use" in self._sources else "default"]

    def _compile(self, source: str) -> Compiled:
        try:
            return Compiled(source)
        except TemplateFault as fault:
            raise self._error(fault) from None

    def _render(self, guard: Protection, count: int, generation_prompt: bool) -> tuple[str, list[Span]]:
        """The text of the first `count` messages, control tokens in them replaced, and its marked spans."""
        named = "tool_use" if guard.tools and "tool_use" in self._compiled else "default"
        variables = {
            "messages": guard.messages[:count],
            "tools": guard.tools,
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **self._special,
        }
        try:
            return self._compiled[named].render(variables, guard.size)
        except TemplateFault as fault:
            raise self._error(fault) from None

    def _error(self, fault: TemplateFault) -> UserError:
        line = f" line {fault.line}" if fault.line else ""
        return UserError(f"{self._where}{line}: {fault.reason}; change the template or the conversation")

    def _closed(self, chat: Conversation, text: str, spans: Sequence[Span]) -> list[Span]:
        """Marked spans, each with the control token right behind it; refused if an answer has no end."""
        found = []
        for first, last in spans:
            following = self._controls.match(text, last)
            found.append((first, following.end() if following else last))
        ends = {match.end() for match in self._controls.finditer(text)}
        closed = sum(first + len(text[first:last].rstrip()) in ends for first, last in found)
        answers = sum(message.role == "assistant" for message in chat.messages)
        if closed < answers:
            raise UserError(
                f"{self._where}: no loss mask: the {{% generation %}} marks show {closed} answers that a "
                f"control token ends, the conversation has {answers}; put each answer and its closing token "
                "between marks"
            )
        return found

    def _by_prefixes(self, guard: Protection, chat: Conversation, whole: str) -> list[Span]:
        """Where the answers stand: after each one's prompt, up to the token that ends the turn."""
        spans = []
        for number, message in enumerate(chat.messages):
            if message.role == "assistant":
                spans.append(self._answer(guard, number, message, whole))
        return spans

    def _answer(self, guard: Protection, number: int, message: Message, whole: str) -> Span:
        try:
            prompt, _ = self._render(guard, number, True)
            said, _ = self._render(guard, number + 1, False)
        except UserError as error:
            raise self._refusal(number, f"the turns before it cannot be rendered ({error})") from None
        if not said.startswith(prompt):
            raise self._refusal(number, _parting("the prompt for it", prompt, "the answer's text", said))
        if not whole.startswith(said):
            raise self._refusal(number, _parting("alone", said, "in the whole conversation", whole))
        written = guard.restore(said[len(prompt) :])
        if missing := [word for word in words_of(message) if not _says(written, word)]:
            raise self._refusal(number, f"the template leaves out {missing[0][:SHOWN_CHARS]!r}")
        ends = [match.end() for match in self._controls.finditer(said, len(prompt))]
        if not ends or said[ends[-1] :].strip():
            raise self._refusal(number, "no control token ends it, so that a model never learns to stop")
        return len(prompt), ends[-1]

    def _refusal(self, number: int, reason: str) -> UserError:
        return UserError(
            f"{self._where}: no loss mask for message {number + 1} (assistant): {reason}; put "
            "{% generation %} marks into the template, or train on conversations that end with this answer"
        )

    def _mask(
        self, tokenizer: Tokenizer, ids: Sequence[int], guard: Protection, text: str, spans: Sequence[Span]
    ) -> list[int]:
        """1 on each token of which a byte lies in a span."""
        pieces = spelt(tokenizer, ids, guard.restore(text))
        if pieces is None:
            raise UserError(
                f"{self._where}: no loss mask: the ids do not spell the text (a normalizer changes it); "
                "use a tokenizer without one"
            )
        mask = [0] * len(ids)
        starts = [start for start, _ in pieces.places]
        for first, last in spans:
            low, high = (pieces.size(guard.restore(text[:at])) for at in (first, last))
            for at in range(max(bisect_right(starts, low) - 1, 0), len(ids)):
                start, end = pieces.places[at]
                if start >= high:
                    break
                mask[at] = int(end > low)
        return mask


def _says(text: str, word: str) -> bool:
    """Whether a text holds a word, blanks around it and the spelling of JSON apart."""
    if word.strip() in text:
        return True
    try:
        return json.dumps(json.loads(word), indent=4, ensure_ascii=False) in text
    except ValueError:
        return False


def _parting(one: str, text: str, other: str, beside: str) -> str:
    """Where two texts part, in words."""
    pairs = enumerate(zip(text, beside, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(beside)))
    shown = [repr(t[max(at - 8, 0) : at + SHOWN_CHARS]) for t in (text, beside)]
    return f"{one} it is {shown[0]}, {other} {shown[1]}"
