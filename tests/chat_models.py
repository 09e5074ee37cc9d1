"""Small Hugging Face tokenizer directories with a chat template: nothing is trained, so they never change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from microlm.core.records import ROLES, Conversation, Message, ToolCall
from microlm.text.bpe.vocabulary import BYTE_OF
from microlm.text.tokenizer import END, MARKS, PAD, SPECIAL

WORDS = ("assistant", "user", "system", "tool", "\n\n", "\n\n\n", "    ", "李白", "诗人", " the", "arguments")
"""What is one token: with line ends among them, so that a token may reach over the end of a role."""


def write_model(
    folder: Path,
    template: str,
    controls: Sequence[str] = MARKS,
    bos: str | None = None,
    nfc: bool = False,
    words: Sequence[str] = (),
) -> Path:
    """A directory for `Tokenizer.load` and `AutoTokenizer`; `controls` are added to the three of ours.

    `words` are put in as tokens that nothing is merged into.
    """
    stand_in = {byte: char for char, byte in BYTE_OF.items()}
    merges: list[tuple[str, str]] = []
    vocabulary = [*SPECIAL, *controls, *(stand_in[b] for b in range(256))]
    for word in WORDS:
        left, *rest = (stand_in[b] for b in word.encode())
        for right in rest:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            if left not in vocabulary:
                vocabulary.append(left)
    vocabulary += ["".join(stand_in[b] for b in word.encode()) for word in words]
    inner = HFTokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    inner.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    inner.add_tokens([AddedToken(t, special=t not in MARKS, normalized=False) for t in controls])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if nfc:
        inner.normalizer = normalizers.NFC()
    folder.mkdir(parents=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD}
    config |= {"bos_token": bos} if bos else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def as_dicts(chat: Conversation) -> list[dict[str, Any]]:
    """The messages as transformers takes them."""
    turns = []
    for message in chat.messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            turn["reasoning_content"] = message.reasoning
        if message.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
                for c in message.tool_calls
            ]
        turns.append(turn)
    return turns


def tools_of(chat: Conversation) -> list[Any] | None:
    """The tools as transformers takes them."""
    return [json.loads(tool) for tool in chat.tools] or None


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "  indented",
        "\n\n\n",
        "\t12 ",
        "诗人\n",
        "",
        " \n x",
        "\r\n",
        "\u3000李白",
        "e\u0301",
        "{{ 7*7 }}",
        "%}",
    ]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS, lambda v: st.lists(v, max_size=3), max_leaves=4
)
OBJECTS = st.dictionaries(TEXTS, _JSON, max_size=3).map(lambda v: json.dumps(v, ensure_ascii=False))
CALLS = st.builds(ToolCall, st.sampled_from(["gpa", "查询", 'a"b']), OBJECTS)
ANSWERS = st.builds(Message, st.just("assistant"), TEXTS, TEXTS, st.lists(CALLS, max_size=2).map(tuple))
TOOLS = st.lists(
    OBJECTS.map(lambda text: f'{{"type": "function", "function": {{"name": "gpa", "parameters": {text}}}}}'),
    max_size=2,
).map(tuple)
MESSAGES = st.one_of(st.builds(Message, st.sampled_from(ROLES), TEXTS), ANSWERS)


def conversations(messages: st.SearchStrategy[Any] = MESSAGES) -> st.SearchStrategy[Conversation]:
    """Any turns in any order, with tools or without."""
    turns = st.lists(messages, min_size=1, max_size=4).map(tuple)
    return st.builds(Conversation, turns, tools=TOOLS)
