"""The twelve smoke checks. Each asks something whose right answer is known for any model, trained or not."""

from __future__ import annotations

import json
from typing import Any

from microlm.core.client import ChatReply
from microlm.core.records import Constraint, Message, Sampling
from microlm.eval.verify.ask import PROMPTS, TOKENS, ask, expect, offered
from microlm.eval.verify.compare import check_multi_turn, check_seed, check_unicode
from microlm.eval.verify.stream import check_stream
from microlm.eval.verify.verdict import Check, Failed, NotOffered, NotShown, Target

CHAT = "/v1/chat/completions"


def check_health(target: Target) -> str:
    """`GET /health` answers 200."""
    status = target.client.request("GET", "/health").status_code
    if status == 404:
        raise NotOffered("no /health (HTTP 404)")
    expect(status == 200, f"GET /health answered {status}")
    return "HTTP 200"


def check_models(target: Target) -> str:
    """The list names at least one model, in OpenAI's shape."""
    data = target.client.call("GET", "/v1/models")
    names = target.client.models()
    expect(data.get("object") == "list", f"object is {data.get('object')!r}, expected 'list'")
    expect(bool(names), "the list is empty")
    return ", ".join(names)


def check_chat(target: Target) -> str:
    """A whole answer: role, text, finish reason, id, usage that adds up."""
    reply = ask(target, PROMPTS[0])
    choice = reply.raw["choices"][0]
    expect(choice.get("message", {}).get("role") == "assistant", "the message's role is not 'assistant'")
    expect(isinstance(choice["message"].get("content"), str), "the message's content is not a string")
    expect(reply.finish_reason in ("stop", "length"), f"finish_reason is {reply.finish_reason!r}")
    expect(bool(reply.id), "the answer has no id")
    expect(reply.raw.get("object") == "chat.completion", f"object is {reply.raw.get('object')!r}")
    usage = reply.usage
    if usage is None:
        raise Failed("the answer has no usage")
    expect(usage.prompt_tokens > 0, "usage.prompt_tokens is 0")
    expect(
        usage.total_tokens == usage.prompt_tokens + usage.completion_tokens,
        f"usage.total_tokens is {usage.total_tokens}, not {usage.prompt_tokens} + {usage.completion_tokens}",
    )
    return f"{usage.completion_tokens} tokens, {reply.finish_reason}"


def check_stop(target: Target) -> str:
    """The text ends before the stop string, with finish_reason 'stop'."""
    prompt, reply = _long_reply(target)
    text = reply.text
    stop = text[len(text) // 2 :][:2]
    expected = text[: text.index(stop)]
    stopped = ask(target, prompt, stop=(stop,))
    expect(stop not in stopped.text, f"the stop string {stop!r} is in the text: stop is ignored")
    expect(stopped.finish_reason == "stop", f"finish_reason is {stopped.finish_reason!r}, expected 'stop'")
    expect(stopped.text == expected, f"the text before {stop!r} is {stopped.text!r}, expected {expected!r}")
    return f"stopped before {stop!r}"


def check_max_tokens(target: Target) -> str:
    """The answer ends at the limit, says so, and counts as many tokens."""
    prompt, reply = _long_reply(target)
    long = reply.usage.completion_tokens if reply.usage else TOKENS
    limit = min(5, max(1, long - 2))  # the last token may be the end mark, which has no text
    short = ask(target, prompt, max_tokens=limit)
    expect(
        len(short.text) < len(reply.text),
        f"max_tokens {limit} and {TOKENS} give texts of equal length: it is ignored",
    )
    expect(short.finish_reason == "length", f"finish_reason is {short.finish_reason!r}, expected 'length'")
    counted = short.usage.completion_tokens if short.usage else None
    expect(counted == limit, f"usage.completion_tokens is {counted}, expected {limit}")
    return f"{limit} tokens, finish_reason length"


def check_schema(target: Target) -> str:
    """`response_format` json_schema: the answer follows the schema."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["person", "place", "work"]},
            "alive": {"type": "boolean"},
        },
        "required": ["name", "kind", "alive"],
        "additionalProperties": False,
    }
    message = Message(
        "user", "Extract as JSON: name, kind, alive.\nText: Li Bai was a poet of the Tang dynasty."
    )
    with offered("response_format json_schema"):
        sampling = Sampling(max_tokens=128, constraint=Constraint("json_schema", json.dumps(schema)))
        reply = target.client.chat((message,), sampling, target.model)
    try:
        answer = json.loads(reply.text)
    except (ValueError, RecursionError):
        raise Failed(
            f"the answer is not JSON (finish_reason {reply.finish_reason}): {reply.text[:80]!r}"
        ) from None
    expect(
        isinstance(answer, dict) and set(answer) == {"name", "kind", "alive"},
        f"wrong keys: {reply.text[:80]!r}",
    )
    expect(isinstance(answer["name"], str) and len(answer["name"]) <= 12, f"name is {answer['name']!r}")
    expect(
        answer["kind"] in ("person", "place", "work"),
        f"kind is {answer['kind']!r}, which the enum does not hold",
    )
    expect(isinstance(answer["alive"], bool), f"alive is {answer['alive']!r}, not a boolean")
    return json.dumps(answer, ensure_ascii=False)


def check_errors(target: Target) -> str:
    """A wrong model and wrong bodies are answered with 4xx and OpenAI's error object."""
    good: dict[str, Any] = {
        "model": target.model,
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
    }
    bad: dict[str, bytes] = {
        "an unknown model": json.dumps(good | {"model": "no-such-model-2f61"}).encode(),
        "messages that are a number": json.dumps(good | {"messages": 5}).encode(),
        "a temperature that is no number": json.dumps(good | {"temperature": "hot"}).encode(),
        "a body that is not JSON": b"{",
    }
    for name, body in bad.items():
        response = target.client.request("POST", CHAT, body)
        expect(400 <= response.status_code < 500, f"{name}: HTTP {response.status_code}, expected 4xx")
        try:
            error = json.loads(response.content)["error"]
            said = isinstance(error["message"], str) and bool(error["message"])
        except (ValueError, RecursionError, KeyError, TypeError):
            said = False
        sent = response.content[:80].decode("utf-8", "replace")
        expect(said, f"{name}: HTTP {response.status_code} without OpenAI's error object: {sent!r}")
    return f"{len(bad)} wrong requests, each 4xx with an error object"


def check_completions(target: Target) -> str:
    """`/v1/completions` continues raw text."""
    with offered("/v1/completions", (404, 405, 501)):
        reply = target.client.complete("Once upon a time", Sampling(max_tokens=8), target.model)
    expect(reply.raw.get("object") == "text_completion", f"object is {reply.raw.get('object')!r}")
    expect(reply.finish_reason in ("stop", "length"), f"finish_reason is {reply.finish_reason!r}")
    return f"{len(reply.text)} characters"


def check_streaming(target: Target) -> str:
    """The events of a stream are OpenAI's, and joined they are the whole answer."""
    message = (Message("user", PROMPTS[0]),)
    sampling = Sampling(max_tokens=TOKENS)
    whole = target.client.chat(message, sampling, target.model)
    with offered("streaming"):
        return check_stream(target.client, target.client.chat_body(message, sampling, target.model), whole)


SMOKE: dict[str, Check] = {
    "health": check_health,
    "models": check_models,
    "chat": check_chat,
    "multi-turn": check_multi_turn,
    "unicode": check_unicode,
    "streaming": check_streaming,
    "stop": check_stop,
    "max_tokens": check_max_tokens,
    "seed": check_seed,
    "json_schema": check_schema,
    "errors": check_errors,
    "completions": check_completions,
}


def _long_reply(target: Target) -> tuple[str, ChatReply]:
    """A prompt whose greedy answer is long enough to be cut, with the answer."""
    for prompt in PROMPTS:
        reply = ask(target, prompt)
        if len(reply.text) >= 4 and (reply.usage is None or reply.usage.completion_tokens >= 3):
            return prompt, reply
    raise NotShown(f"the model answers none of {len(PROMPTS)} prompts with 4 characters")
