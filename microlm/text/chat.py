"""ChatML. One walk over the messages gives ids and loss mask; the Jinja form beside it gives the same text."""

from __future__ import annotations

from collections.abc import Sequence

from microlm.core.records import Message
from microlm.text.tokenizer import END, START, Tokenizer

JINJA = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
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

    The newline after a turn belongs to nobody; a control token typed inside a message stays text.
    """
    ids: list[int] = []
    mask: list[int] = []
    newline = tokenizer.encode("\n")
    for message in messages:
        head = [tokenizer.start_id, *tokenizer.encode(f"{message.role}\n")]
        body = tokenizer.encode(message.content)
        learn = int(message.role == "assistant")
        ids += [*head, *body, tokenizer.eos_id, *newline]
        mask += [0] * len(head) + [learn] * (len(body) + 1) + [0] * len(newline)
    if generation_prompt:
        head = [tokenizer.start_id, *tokenizer.encode("assistant\n")]
        ids += head
        mask += [0] * len(head)
    return ids, mask
