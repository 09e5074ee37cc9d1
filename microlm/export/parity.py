"""An HF directory as we read it against plain transformers: token ids, chat template ids, logits.

Enters: a directory that was written, held-out texts and conversations. Leaves: a report of what differs.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microlm.core.errors import CheckFailed, UserError
from microlm.core.records import Conversation, Message, ToolCall
from microlm.model import directory
from microlm.model.config import ModelConfig
from microlm.model.transformer import Decoder
from microlm.text.chat import chat_ids
from microlm.text.chat.directory import read_sources
from microlm.text.chat.protection import template_message
from microlm.text.chat.renderer import TODAY
from microlm.text.read import texts_of
from microlm.text.tokenizer import Tokenizer

ANOTHER_DAY = TODAY + datetime.timedelta(days=45)
TOLERANCE = 1e-4  # largest difference of two float32 logits
PROMPT_TOKENS = 128
HELD_OUT_TEXTS, HELD_OUT_CHATS = 24, 8  # whose logits are compared
MAX_LOGITS = 2**28  # of one sequence: 1 GiB on each side, and as much for their difference

TEXTS = (
    "李白是唐代的诗人，生于701年。",
    "Extract as JSON: born in, capital\nText: Ada Lovelace was born in London.",
    "抽取为JSON：出生地、首都\n文本：玛丽·居里出生于华沙。",
    '{"李白":{"朝代":"唐"}}',
    "  two  spaces,\ttabs\n\n\nand empty lines  ",
    "naïve café — 東京 한국 العربية 👩🏽‍🚀 \u200d é e\u0301",
    "<|im_start|>system\ntyped by a user<|im_end|><|endoftext|>",
    "x = [i**2 for i in range(10)]  # 0, 1, 4 … 81",
)
"""Lines that every export is tried with, whatever its data was."""

CONVERSATIONS = (
    Conversation((Message("user", "李白是谁？"),)),
    Conversation(
        (
            Message("system", "Answer briefly."),
            Message("user", "Who was Li Bai?"),
            Message("assistant", "A poet."),
        )
    ),
    Conversation(
        (Message("user", " \n 缩进"), Message("assistant", "\n\n  indented "), Message("user", "5\t"))
    ),
    Conversation(
        (
            Message("user", "2 + 2?"),
            Message("assistant", "I count.", tool_calls=(ToolCall("add", '{"numbers": [2, 2]}'),)),
            Message("tool", "4"),
            Message("assistant", "4", "two and two"),
        ),
        tools=('{"type": "function", "function": {"name": "add", "description": "求和"}}',),
    ),
)


def compare(
    path: Path, texts: Sequence[str], conversations: Sequence[Conversation], most: int | None = None
) -> dict[str, Any]:
    """Compare on the fixed lines and the given ones; the first difference of each kind is in the report.

    `most`: tokens of the longest sequence; none: the window. A model without template has no conversations.
    """
    tokenizer = Tokenizer.load(path)
    has_template = bool(read_sources(path)) or tokenizer.has_chatml
    lines, chats = [*TEXTS, *texts], [*CONVERSATIONS, *conversations] if has_template else []
    with quiet_transformers():
        theirs = _auto_tokenizer(path)
        report = _compare_tokens(theirs, tokenizer, lines) | _compare_chats(theirs, tokenizer, chats)
        talks = conversations if has_template else []
        report |= _compare_logits(path, _prompts(path, tokenizer, texts, talks, most))
    difference = report["logits_max_abs_difference"]
    small = difference is not None and difference <= TOLERANCE
    unequal = ("texts_unequal", "controls_unequal", "conversations_unequal")
    rendered = report["conversations"] > 0 or not has_template
    report["ok"] = small and rendered and not any(report[name] for name in unequal)
    return report


def require(report: dict[str, Any], where: str) -> None:
    """CheckFailed with what differs."""
    if report["conversations_refused"] and not report["conversations"]:
        raise CheckFailed(
            f"{where}: its template renders none of the conversations, so none was compared; "
            "change the template"
        )
    if not report["ok"]:
        difference = report["logits_max_abs_difference"]
        shown = "are not finite" if difference is None else f"differ by up to {difference:.3g}"
        raise CheckFailed(
            f"{where}: transformers does not agree with us: {report['texts_unequal']} texts, "
            f"{report['controls_unequal']} control tokens and "
            f"{report['conversations_unequal']} conversations have other ids, logits {shown} "
            f"(allowed {TOLERANCE:g}); see logs/parity.json"
        )


def _compare_tokens(theirs: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Ids of texts (control tokens typed in them stay text on both sides), and of the control tokens."""
    ids = [theirs(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in texts]
    unequal = [t for t, a, b in zip(texts, tokenizer.encode_batch(texts), ids, strict=True) if a != b]
    return {
        "texts": len(texts),
        "texts_unequal": len(unequal),
        "first_unequal_text": next(iter(unequal), None),
        "controls_unequal": sum(tokenizer.control.get(t) != i for t, i in theirs.get_added_vocab().items()),
    }


def _compare_chats(theirs: Any, tokenizer: Tokenizer, chats: Sequence[Conversation]) -> dict[str, Any]:
    """Ids of conversations by our walk and by the saved Jinja template; a generation prompt after a user.

    What our sandbox refuses (tool calls that a template knows not, or a template that never ends) is counted,
    and not asked of transformers, which renders in this process without limits of time and memory.
    """
    plain = [c for c in chats if not any(token in t for token in tokenizer.control for t in texts_of(c))]
    refused, dated, unequal = 0, False, list[str]()
    for chat in plain:
        known = _our_ids(tokenizer, chat)
        refused += known is None
        if known is None:
            continue
        if (said := _their_ids(theirs, chat, TODAY)) != known:
            unequal.append(chat.messages[0].content)
        dated = dated or _their_ids(theirs, chat, ANOTHER_DAY) != said
    first = next(iter(unequal), None)
    return {
        "conversations": len(plain) - refused,
        "conversations_refused": refused,
        "conversations_unequal": len(unequal),
        "first_unequal_conversation": first,
        "template_tells_the_date": dated,
    }


def tell(report: Mapping[str, Any], where: str) -> None:
    """What a person should know of a report that passed, on stderr."""
    if refused := report["conversations_refused"]:
        sys.stderr.write(f"{where}: the chat template refuses {refused} conversations\n")
    if report["template_tells_the_date"]:
        sys.stderr.write(
            f"{where}: the chat template tells the date, here always {TODAY}; other engines say today's\n"
        )


def _their_ids(theirs: Any, chat: Conversation, date: datetime.date) -> list[int] | None:
    """What transformers makes of a conversation on a day; None where the template refuses it."""
    ask = chat.messages[-1].role == "user"
    turns = [template_message(m) for m in chat.messages]
    tools = [json.loads(tool) for tool in chat.tools] or None
    try:
        ids: list[int] = theirs.apply_chat_template(
            turns,
            tools,
            add_generation_prompt=ask,
            return_dict=False,
            date_string=date.strftime("%d %b %Y"),
            strftime_now=date.strftime,
        )
    except Exception:  # a template's expression can raise anything
        return None
    return ids


def _our_ids(tokenizer: Tokenizer, chat: Conversation) -> list[int] | None:
    try:
        return chat_ids(tokenizer, chat, generation_prompt=chat.messages[-1].role == "user")
    except UserError:
        return None


def longest(config: ModelConfig, most: int | None = None) -> int:
    """Tokens of the longest sequence that is compared: the window or `most`, unless memory forbids."""
    window = config.max_position_embeddings
    return min(window, most or window, MAX_LOGITS // config.vocab_size)


def _prompts(
    path: Path,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    conversations: Sequence[Conversation],
    most_tokens: int | None,
) -> list[list[int]]:
    """The beginnings of fixed lines, held-out texts and chats; then all lines as one long sequence."""
    most = longest(directory.read_config(path), most_tokens)
    lines = tokenizer.encode_batch([*TEXTS, *texts[:HELD_OUT_TEXTS]])
    chats = [_our_ids(tokenizer, c) or [] for c in conversations[:HELD_OUT_CHATS]]
    filling = cycle(chain.from_iterable([*line, tokenizer.eos_id] for line in lines))
    short = [ids[: min(PROMPT_TOKENS, most)] for ids in (*lines, *chats) if ids]
    return [*short, list(islice(filling, most))]


def _compare_logits(path: Path, ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The largest difference at any position, both computed in float32 from the same files.

    It is null when a logit is not finite. Both models are loaded, and the logits of one prompt at a time.
    """
    prompts = [torch.tensor([list(p)]) for p in ids]
    ours, theirs = directory.load(path).eval(), _auto_model(path)
    difference = float(torch.stack([_difference(ours, theirs, p) for p in prompts]).max())
    return {
        "prompts": len(prompts),
        "positions": sum(p.shape[1] for p in prompts),
        "longest_prompt": max(p.shape[1] for p in prompts),
        "logits_max_abs_difference": difference if math.isfinite(difference) else None,
        "tolerance": TOLERANCE,
    }


@torch.inference_mode()
def _difference(ours: Decoder, theirs: Any, prompt: Tensor) -> Tensor:
    return (ours(prompt) - theirs(prompt).logits.float()).abs_().max()


def _auto_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


def _auto_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and no advice on a person's terminal, by transformers' own switches."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
