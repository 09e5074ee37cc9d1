"""Chat templates. Enters: a tokenizer's directory and conversations. Leaves: their text, ids and loss masks.

Our own template is a walk (`chatml`); any other is a Jinja text that the directory brings along (`adopted`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from microlm.core.errors import UserError
from microlm.core.records import Conversation, Message
from microlm.text.chat.adopted import Adopted
from microlm.text.chat.chatml import ChatML
from microlm.text.chat.directory import read_sources, special_tokens
from microlm.text.tokenizer import END, START, Tokenizer

Template = ChatML | Adopted


def template_text(assistant_name: str | None) -> str:
    """Our template as Jinja, for a model's directory; a name gives conversations a default system turn."""
    return ChatML.named(assistant_name).source


@lru_cache(maxsize=8)
def template_of(tokenizer: Tokenizer) -> Template:
    """The template of the tokenizer's directory; ours where there is none, if it has ChatML's tokens."""
    sources = read_sources(tokenizer.path)
    if not sources and not tokenizer.has_chatml:
        raise UserError(
            f"{tokenizer.path}: has no chat template, and its tokenizer lacks the tokens of ours "
            f"({START}, {END}); take the variant that is tuned for chats, or put a chat_template.jinja there"
        )
    own = ChatML.read(sources["default"]) if "default" in sources else ChatML()
    return own or Adopted(sources, special_tokens(tokenizer.path), tokenizer)


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    generation_prompt: bool = False,
    tools: Sequence[str] = (),
) -> str:
    """The conversation as one string."""
    return template_of(tokenizer).render(_chat(messages, tools), generation_prompt)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    generation_prompt: bool = False,
    tools: Sequence[str] = (),
) -> tuple[list[int], list[int]]:
    """Ids of the conversation and a mask: 1 on what the assistant writes, the EOS that closes it included.

    With a generation prompt it is a question: nothing in it is learnt. Control tokens typed inside a message
    stay text. Raises UserError when a foreign template cannot render the conversation or tell its answers.
    """
    chat = _chat(messages, tools)
    if generation_prompt:
        ids = chat_ids(tokenizer, chat, generation_prompt)
        return ids, [0] * len(ids)
    [encoded] = encode_chats(tokenizer, [chat])
    return encoded


def chat_ids(tokenizer: Tokenizer, chat: Conversation, generation_prompt: bool = False) -> list[int]:
    """The ids of `encode_chat` alone: a foreign template need not be able to tell the answers."""
    return template_of(tokenizer).ids(tokenizer, chat, generation_prompt)


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[Conversation]
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and mask of many conversations, as `encode_chat` has them; texts are encoded in one batch."""
    return template_of(tokenizer).encode(tokenizer, chats)


def _chat(messages: Sequence[Message], tools: Sequence[str]) -> Conversation:
    return Conversation(tuple(messages), tools=tuple(tools))
