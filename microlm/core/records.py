"""The only types that cross floors. Enters: plain JSON objects at the border; leaves: frozen records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of raw text. `source` is `file:line` or the generator's name for it."""

    text: str
    source: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant makes; `arguments` is the JSON text of an object, as OpenAI writes it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; what the assistant thought before it spoke, what it called after."""

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; `task` names what it teaches (chat, question, extraction, reading …).

    `tools` are what the assistant may call: the JSON text of OpenAI's `{type, function}`, each.
    """

    messages: tuple[Message, ...]
    task: str = "chat"
    source: str = ""
    licence: str = ""
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a preferred and a rejected answer; thinking and calls stand in the answers as text.

    `task` names what it teaches, as a conversation's does.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str = ""
    licence: str = ""
    tools: tuple[str, ...] = ()
    task: str = "chat"


@dataclass(frozen=True, slots=True)
class Triple:
    """One relation of an extraction record (InstructIE names)."""

    head: str
    relation: str
    tail: str
    head_type: str = ""
    tail_type: str = ""


@dataclass(frozen=True, slots=True)
class Extraction:
    """An InstructIE record: `id, cate, text, relation[...]`; `allowed` are the relations asked for, in order.

    `kind` says which held-out wording made the text: specific, generic, mixed, or train.
    """

    id: str
    cate: str
    text: str
    relation: tuple[Triple, ...]
    allowed: tuple[str, ...] = ()
    kind: str = ""
    lang: str = "zh"
    source: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its one exact answer; `kind` is the wording's kind (specific, generic).

    `entity` is the name that is asked about, where known: what a lookup may use, never the model.
    """

    id: str
    question: str
    answer: str
    kind: str = ""
    lang: str = "zh"
    entity: str = ""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an output must be, as a grammar. `value` by kind:

    json_schema: the JSON text of a schema; json_object, copy: empty; regex: a pattern that the whole output
    matches; choice: the JSON text of a list of strings; grammar: EBNF in the Lark form, or GBNF.
    `copy_from`: a text whose substrings are the only strings that an output holds: the output itself (copy),
    every string of a schema that no enum, const, pattern or format bounds, or a grammar's terminal COPY.
    `copy_words`: a copy begins and ends where words of the text do.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar", "copy"]
    value: str = ""
    copy_from: str | None = None
    copy_words: bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `max_tokens` counts new tokens.

    `seed` makes a request repeatable; `n` answers are drawn, answer i with seed + i. Penalties are vLLM's:
    repetition over prompt and answer, presence and frequency over the answer. `logit_bias`: (id, its addend).
    `logprobs`: of each new token, and of so many likeliest ones beside it (None: none are computed);
    `prompt_logprobs`: the same of the prompt's tokens.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural-log probability before temperature and penalties; `top`: likeliest (id, theirs)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine answered: text without the EOS, its ids (EOS included when drawn), and why it ended.

    `cached_tokens`: how many of the prompt's were in the cache already. `index`: which of `n` answers it is.
    `prompt_logprobs` has None for the first token, which nothing predicts.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    error: str = ""
    index: int = 0
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer of a predictor to one task item, with its raw text."""

    id: str
    task: str
    prompt: str
    output: str
    finish_reason: str
    extra: dict[str, Any] = field(default_factory=dict)


def words_of(message: Message) -> tuple[str, ...]:
    """All that a message says: what was thought, the words, the calls."""
    if not (message.reasoning or message.tool_calls):
        return (message.content,)
    calls = (word for call in message.tool_calls for word in (call.name, call.arguments))
    return (*((message.reasoning,) if message.reasoning else ()), message.content, *calls)


_WHERE_THERE_ARE = frozenset({"reasoning", "tool_calls", "tools"})


def to_json(record: Any) -> dict[str, Any]:
    """The JSON object of any record here; thinking, calls and tools only where there are any."""
    return asdict(record, dict_factory=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if value or key not in _WHERE_THERE_ARE}
