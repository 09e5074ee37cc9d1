"""OpenAI's request bodies. Enters: parsed JSON; leaves: a typed request with its `Sampling`, or an error.

What this server does not do yet (tools, logprobs, penalties …) is refused unless at its neutral value.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from microlm.core.records import Message, Role, Sampling
from microlm.serve.errors import UNSUPPORTED, ApiError, printable, unsupported

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_TOKENS = 1_000_000
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "top_logprobs": None,
    "logit_bias": {},
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
MESSAGE_NEUTRAL = ("name", "refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not text") from None
    return text


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("expected a number")
    return value


Text = Annotated[str, AfterValidator(_encodable)]
Real = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]
Flag = Annotated[bool, Strict()]


class Wire(BaseModel):
    """Base of the request bodies: unknown fields are looked at, not dropped."""

    model_config = ConfigDict(extra="allow", frozen=True)


class ChatMessage(Wire):
    """One turn as OpenAI writes it; a list of text parts is joined."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatMessage:
        if self.role in ("tool", "function"):
            raise ApiError(
                400, f"role '{self.role}' is not supported: this server has no tools", UNSUPPORTED, "messages"
            )
        for name, value in (self.model_extra or {}).items():
            if name not in MESSAGE_NEUTRAL or (value not in (None, [], "") and name != "name"):
                raise unsupported(f"messages.{printable(name)}")
        if self.content is None:
            raise ValueError("content is missing")
        return self

    @property
    def record(self) -> Message:
        """Our record of it."""
        role: Role = "user" if self.role == "user" else "assistant" if self.role == "assistant" else "system"
        return Message(role, self.content if isinstance(self.content, str) else _join(self.content or []))


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
    def constraint(self) -> str | None:
        """The schema as a JSON text; None when the answer is free."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return '{"type":"object"}'
        assert self.json_schema is not None
        return json.dumps(self.json_schema.schema_, ensure_ascii=False, allow_nan=False)

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must stand beside type 'json_schema', and only there")
        try:
            _encodable(self.constraint or "")
        except ValueError:
            raise ValueError("the schema holds a number or text that is not JSON") from None
        return self


class Request(Wire):
    """The fields that both kinds of request have."""

    model: Text
    temperature: Real | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Real | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: Whole | None = Field(None, ge=0, le=1_000_000, description="our extension, 0: off")
    max_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)
    n: Whole | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: Flag | None = Field(None, description="our extension, as in vLLM")
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

    def sampling(self, default_tokens: int) -> list[Sampling]:
        """How each of the `n` answers is drawn; a given seed counts up from answer to answer."""
        return [
            Sampling(
                max_tokens=self.token_limit or default_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=self.top_k or 0,
                seed=None if self.seed is None else (self.seed + i) % 2**63,
                stop=self.stops,
                json_schema=self.response_format.constraint if self.response_format else None,
                ignore_eos=bool(self.ignore_eos),
            )
            for i in range(self.choices)
        ]


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)

    @property
    def token_limit(self) -> int | None:
        """How many new tokens at most: the newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def turns(self) -> list[Message]:
        """The conversation as records."""
        return [m.record for m in self.messages]


class CompletionRequest(Request):
    """`POST /v1/completions`: one prompt or several, each a text or token ids."""

    prompt: Text | list[Text] | list[Whole] | list[list[Whole]]

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


def _join(parts: list[dict[str, Any]]) -> str:
    """The text parts of one message; pictures and sound are refused."""
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, "content parts other than text are not supported", UNSUPPORTED, "messages")
    try:
        return _encodable("".join(part["text"] for part in parts))
    except ValueError as e:
        raise ApiError(400, f"'messages': {e}", "invalid_value", "messages") from None
