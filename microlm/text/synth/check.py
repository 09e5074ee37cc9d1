"""Whether an answer is fit to learn from. Enters: a reply, a JSON schema; leaves: its value, or a `Fault`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from microlm.core.client import ChatReply
from microlm.text.read import Fault
from microlm.text.synth.templates import require_utf8

_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(.*?)\n?```\Z", re.DOTALL)


def check_reply(reply: ChatReply, schema: Mapping[str, Any] | None) -> tuple[str, Any]:
    """The answer's text and its value (the text itself without a schema); raises Fault."""
    require_finished(reply)
    text = require_utf8(reply.text.strip())
    if not text:
        raise Fault("empty_answer", "the answer is empty")
    if schema is None:
        return text, text
    text = unfenced(text)
    return text, check_json(text, schema)


def require_finished(reply: ChatReply) -> None:
    """Fault for an answer that somebody cut."""
    if reply.finish_reason == "length":
        raise Fault("cut_off", "the answer was cut at max_tokens")
    if reply.finish_reason == "content_filter":
        raise Fault("filtered", "the endpoint's filter took the answer")


def unfenced(text: str) -> str:
    """JSON without the code fence that chat models put around it."""
    fence = _FENCE.match(text)
    return fence[1].strip() if fence else text


def check_json(text: str, schema: Mapping[str, Any]) -> Any:
    """The value of a JSON text that fits the schema; raises Fault, its reason named after the keyword."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        error = next(_validator(schema).iter_errors(value), None)
    except ValueError as e:
        raise Fault("not_json", f"the answer is not JSON ({e})") from None
    except RecursionError:
        raise Fault("not_json", "the answer is nested too deeply") from None
    if error is not None:
        raise Fault(f"schema:{error.validator}", f"{error.json_path}: {error.message[:200]}")
    return value


def check_schema(schema: Mapping[str, Any]) -> None:
    """ValueError unless it is a JSON schema (draft 2020-12) whose references lie within it."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as e:
        raise ValueError(f"not a JSON schema ({e.json_path}: {e.message[:100]})") from None
    whole = DRAFT202012.create_resource(schema)
    resolver = Registry().with_resource("", whole).resolver()
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise ValueError(f"$ref '{reference}' does not lead to a place in this schema") from None


def _validator(schema: Mapping[str, Any]) -> Any:
    return Draft202012Validator(schema, registry=Registry())  # an empty registry fetches nothing


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
