"""The turns of OpenAI's requests, and the kinds of value that all fields are made of. Leave: our records."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from microlm.core.records import Message, Role, ToolCall
from microlm.serve.errors import UNSUPPORTED, ApiError, printable, unsupported
from microlm.text.read import Fault
from microlm.text.sources.marked import answered, tool_call

MESSAGE_NEUTRAL = ("name", "refusal", "annotations", "audio", "function_call", "tool_call_id")
MESSAGE_NAMES = ("name", "tool_call_id")  # accepted and not used


def encodable(text: str) -> str:
    """Text that can be written as UTF-8, or a ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not text") from None
    return text


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("expected a number")
    return value


Text = Annotated[str, AfterValidator(encodable)]
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


def _join(parts: list[dict[str, Any]]) -> str:
    """The text parts of one message; pictures and sound are refused."""
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, "content parts other than text are not supported", UNSUPPORTED, "messages")
    try:
        return encodable("".join(part["text"] for part in parts))
    except ValueError as e:
        raise ApiError(400, f"'messages': {e}", "invalid_value", "messages") from None
