"""OpenAI's request bodies. Enters: parsed JSON; leaves: a typed request with its `Sampling`, or an error.

What this server does not do yet (logprobs, penalties …) is refused unless at its neutral value. Tools reach
the template with `tool_choice` "none": the calls of an answer are not read out of its text.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from microlm.core.records import Constraint, Conversation, Message, Role, Sampling, ToolCall
from microlm.serve.errors import UNSUPPORTED, ApiError, printable, unsupported
from microlm.text.read import Fault
from microlm.text.sources.marked import answered, tool_call, tool_text

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
MESSAGE_NEUTRAL = ("name", "refusal", "annotations", "audio", "function_call", "tool_call_id")
MESSAGE_NAMES = ("name", "tool_call_id")  # accepted and not used


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


class CalledFunction(Wire):
    """The function that an earlier answer called; `arguments` is a JSON text."""

    name: Text
    arguments: Text

    @property
    def record(self) -> ToolCall:
        """Our record of it."""
        try:
            return tool_call(self.name, self.arguments)
        except Fault as fault:
            raise ApiError(400, fault.detail, "invalid_value", "messages") from None


class CalledTool(Wire):
    """A call of an earlier answer."""

    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Wire):
    """One turn as OpenAI writes it; a list of text parts is joined."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[dict[str, Any]] | None = None
    reasoning_content: Text | None = Field(None, description="what an earlier answer thought, as in vLLM")
    tool_calls: list[CalledTool] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatMessage:
        for name, value in (self.model_extra or {}).items():
            if name not in MESSAGE_NEUTRAL or (value not in (None, [], "") and name not in MESSAGE_NAMES):
                raise unsupported(f"messages.{printable(name)}")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError("only the assistant thinks and calls tools")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    @property
    def record(self) -> Message:
        """Our record of it."""
        role: Role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else _join(self.content or [])
        if role != "assistant":
            return Message(role, content)
        calls = tuple(call.function.record for call in self.tool_calls or [])
        said = answered(content)  # thinking and calls that our own answers hold as text
        return replace(
            said, reasoning=self.reasoning_content or said.reasoning, tool_calls=said.tool_calls + calls
        )


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
        schema = json.dumps(self.json_schema.schema_, ensure_ascii=False, allow_nan=False)
        return Constraint("json_schema", schema)

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must stand beside type 'json_schema', and only there")
        try:
            _encodable(self.constraint.value if self.constraint else "")
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
                constraint=self.response_format.constraint if self.response_format else None,
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
            tools = tuple(_encodable(tool_text(tool)) for tool in self.tools or [])
        except (Fault, ValueError) as e:
            raise ApiError(400, f"'tools': {e}", "invalid_value", "tools") from None
        return Conversation(tuple(m.record for m in self.messages), tools=tools)


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
