"""OpenAI's request bodies. Enters: parsed JSON; leaves: a typed request with its `Sampling`, or an error.

What this server does not do (sound, stored answers …) is refused unless at its neutral value. Tools reach
the template with `tool_choice` "none": the calls of an answer are not read out of its text.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from microlm.core.errors import UserError
from microlm.core.payload import constraint_of
from microlm.core.records import Constraint, Conversation, Sampling
from microlm.serve.errors import UNSUPPORTED, ApiError, printable, unsupported
from microlm.serve.messages import ChatMessage, Flag, Real, Text, Whole, Wire, encodable
from microlm.text.read import Fault
from microlm.text.sources.marked import tool_text

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_TOKENS = 1_000_000
MAX_LOGPROBS = 20
MAX_BIASES = 1024
NEUTRAL: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": None,
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "audio": None,
    "prediction": None,
    "reasoning_effort": None,
    "verbosity": None,
    "store": False,
    "metadata": {},
    "service_tier": "auto",
    "web_search_options": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "best_of": 1,
    "echo": False,
    "suffix": None,
}


Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


def _json_text(schema: dict[str, Any]) -> str:
    """A schema as text, or a ValueError."""
    try:
        return encodable(json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except ValueError:
        raise ValueError("the schema holds a number or text that is not JSON") from None


class StreamOptions(BaseModel):
    """`include_usage`: one more event with the token counts before `[DONE]`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: Flag | None = None


class SchemaFormat(BaseModel):
    """A named JSON schema; it is always followed strictly."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    name: Text = "answer"
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """text, json_object, or json_schema with its schema."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @property
    def constraint(self) -> Constraint | None:
        """What the answer must be; None when it is free."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Constraint("json_object")
        return Constraint("json_schema", _json_text(self.json_schema.schema_))

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must stand beside type 'json_schema', and only there")
        return self


class StructuredOutputs(BaseModel):
    """vLLM's name for what an answer must be; one of them."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    json_: dict[str, Any] | Text | None = Field(None, alias="json")
    json_object: Flag | None = None
    regex: Text | None = None
    choice: list[Text] | None = Field(None, min_length=1)
    grammar: Text | None = None


class Request(Wire):
    """The fields that both kinds of request have."""

    model: Text
    temperature: Real | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Real | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: Whole | None = Field(None, ge=0, le=1_000_000, description="as in vLLM, 0: off")
    min_p: Real | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="as in vLLM")
    presence_penalty: Real | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: Real | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: Real | None = Field(
        None, ge=0.01, le=100, allow_inf_nan=False, description="as in vLLM"
    )
    logit_bias: dict[int, Bias] | None = Field(None, max_length=MAX_BIASES)
    max_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)
    n: Whole | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="as in vLLM")
    copy_from: Text | None = Field(None, description="ours: free texts of the answer are parts of this one")
    copy_words: Flag | None = Field(None, description="ours: a copy begins and ends where words do")
    ignore_eos: Flag | None = Field(None, description="as in vLLM")
    user: Text | None = Field(None, description="accepted, not used and not logged")

    @model_validator(mode="after")
    def _check(self) -> Request:
        for name, value in (self.model_extra or {}).items():
            if name not in NEUTRAL:
                raise ApiError(
                    400, f"unknown parameter '{printable(name)}'", "unknown_parameter", printable(name)
                )
            if value is not None and value != NEUTRAL[name]:
                raise unsupported(name)
        if len(self.stops) > MAX_STOPS or not all(0 < len(s) <= 256 for s in self.stops):
            raise ValueError(f"stop: at most {MAX_STOPS} strings of 1 to 256 characters")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        self.constraint()
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """How many answers are asked for to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        """How many new tokens at most; None: the kind's default."""
        return self.max_tokens

    @property
    def listed_logprobs(self) -> int | None:
        """How many likeliest tokens are listed beside each; None: no log-probabilities are wanted."""
        return None

    def constraint(self) -> Constraint | None:
        """What the answer must be; None when it is free."""
        given = self.structured_outputs.model_dump(exclude_none=True) if self.structured_outputs else {}
        bound = self.response_format.constraint if self.response_format else None
        if given and bound is not None:
            raise ValueError("response_format and structured_outputs both bound the answer; give one")
        if bound is not None:
            given[bound.kind] = bound.value if bound.kind == "json_schema" else True
        if (schema := given.pop("json_", None)) is not None:
            given["json_schema"] = schema if isinstance(schema, str) else _json_text(schema)
        try:
            return constraint_of(**given, copy_from=self.copy_from, copy_words=bool(self.copy_words))
        except UserError as e:
            raise ValueError(str(e)) from None

    def sampling(self, default_tokens: int) -> list[Sampling]:
        """How each of the `n` answers is drawn; a given seed counts up from answer to answer."""
        bias = self.logit_bias or {}
        return [
            Sampling(
                max_tokens=self.token_limit or default_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=self.top_k or 0,
                min_p=self.min_p or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                repetition_penalty=self.repetition_penalty or 1.0,
                logit_bias=tuple(bias.items()),
                logprobs=self.listed_logprobs,
                seed=None if self.seed is None else (self.seed + i) % 2**63,
                stop=self.stops,
                constraint=self.constraint(),
                ignore_eos=bool(self.ignore_eos),
            )
            for i in range(self.choices)
        ]


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: Any = None
    logprobs: Flag | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def listed_logprobs(self) -> int | None:
        """None unless `logprobs` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        if self.tools and self.tool_choice is None:
            raise ApiError(
                400,
                "the calls of an answer are not read out of its text here; set tool_choice to 'none' to get "
                "them as <tool_call> blocks",
                UNSUPPORTED,
                "tools",
            )
        if self.tool_choice not in (None, "none"):
            raise unsupported("tool_choice")
        return self

    @property
    def token_limit(self) -> int | None:
        """How many new tokens at most: the newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def conversation(self) -> Conversation:
        """The messages and tools as records."""
        try:
            tools = tuple(encodable(tool_text(tool)) for tool in self.tools or [])
        except (Fault, ValueError) as e:
            raise ApiError(400, f"'tools': {e}", "invalid_value", "tools") from None
        return Conversation(tuple(m.record for m in self.messages), tools=tools)


class CompletionRequest(Request):
    """`POST /v1/completions`: one prompt or several, each a text or token ids."""

    prompt: Text | list[Text] | list[Whole] | list[list[Whole]]
    logprobs: Whole | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def listed_logprobs(self) -> int | None:
        """A number, here."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
