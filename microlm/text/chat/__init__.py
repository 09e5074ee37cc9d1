"""ChatML. One walk over the messages gives ids and loss mask; the Jinja form gives the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from microlm.core.records import Message
from microlm.text.tokenizer import END, START, Tokenizer

JINJA = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render(messages: Sequence[Message], generation_prompt: bool = False) -> str:
    """The conversation as one string."""
    turns = "".join(f"{START}{m.role}\n{m.content}{END}\n" for m in messages)
    return turns + (f"{START}assistant\n" if generation_prompt else "")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of the conversation and a mask: 1 on the assistant's words and on the EOS that closes them.

    The newline after a turn belongs to nobody; a control token typed inside a message stays text. Role and
    words are encoded as one string, as the Jinja form does it: a token may reach over the newline between.
    """
    [encoded] = encode_chats(tokenizer, [messages])
    ids, mask = encoded
    if generation_prompt:
        head = [tokenizer.start_id, *tokenizer.encode("assistant\n")]
        ids += head
        mask += [0] * len(head)
    return ids, mask


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[Sequence[Message]]
) -> Iterator[tuple[list[int], list[int]]]:
    """`encode_chat` of many conversations; their turns are encoded in one batch, on all cores."""
    turns = iter(tokenizer.encode_batch([f"{m.role}\n{m.content}" for messages in chats for m in messages]))
    newline = tokenizer.encode("\n")
    for messages in chats:
        ids: list[int] = []
        mask: list[int] = []
        for message in messages:
            turn = next(turns)
            covered = _count_covering(tokenizer, turn, len(message.role) + 1)
            learn = int(message.role == "assistant")
            ids += [tokenizer.start_id, *turn, tokenizer.eos_id, *newline]
            mask += [0] * (1 + covered) + [learn] * (len(turn) - covered + 1) + [0] * len(newline)
        yield ids, mask


def _count_covering(tokenizer: Tokenizer, ids: Sequence[int], size: int) -> int:
    """How many of the first ids it takes to cover `size` bytes."""
    covered = 0
    for count, token_id in enumerate(ids):
        if covered >= size:
            return count
        covered += len(tokenizer.token_bytes[token_id])
    return len(ids)
