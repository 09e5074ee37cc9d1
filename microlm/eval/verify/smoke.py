"""The twelve smoke checks. Each asks something whose right answer is known for any model, trained or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from microlm.core.client import ChatReply, EndpointError
from microlm.core.records import Message, Sampling
from microlm.eval.verify.stream import check_stream
from microlm.eval.verify.verdict import Check, Failed, NotOffered, Target

CHAT = "/v1/chat/completions"
PROMPTS = ("Hello, who are you?", "Write a long story about the sea.", "李白是谁？", "1, 2, 3, 4, 5,")
UNICODE = "你好，世界🙂é"
TOKENS = 32


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


def check_multi_turn(target: Target) -> str:
    """Earlier turns are read: they make the prompt longer."""
    turns = (
        Message("user", "My name is Ada."),
        Message("assistant", "Hello Ada."),
        Message("user", "Who am I?"),
    )
    whole = target.client.chat(turns, Sampling(max_tokens=TOKENS), target.model)
    last = target.client.chat(turns[-1:], Sampling(max_tokens=TOKENS), target.model)
    if whole.usage is None or last.usage is None:
        return "answered; without usage it cannot be seen whether earlier turns are read"
    more = whole.usage.prompt_tokens - last.usage.prompt_tokens
    expect(
        more > 0, f"the earlier turns add no prompt tokens ({whole.usage.prompt_tokens}): they are ignored"
    )
    return f"earlier turns add {more} prompt tokens"


def check_unicode(target: Target) -> str:
    """Chinese, emoji and accents go in and come out whole, streamed and not."""
    schema = {
        "type": "object",
        "properties": {"t": {"const": UNICODE}},
        "required": ["t"],
        "additionalProperties": False,
    }
    message = (Message("user", f"请重复：{UNICODE}"),)
    free = Sampling(max_tokens=TOKENS)
    bound = Sampling(max_tokens=100, json_schema=json.dumps(schema))
    seen = ""
    for sampling in (free, bound):
        try:
            whole = target.client.chat(message, sampling, target.model).text
        except EndpointError as e:
            if sampling is bound and e.status in (400, 422):
                break
            raise
        joined = "".join(d.text for d in target.client.chat_stream(message, sampling, target.model))
        broken = whole.count("\ufffd")  # a barely trained model writes broken bytes itself, but not here:
        expect(sampling is free or not broken, "U+FFFD in an answer bound to whole characters")
        expect(
            joined.count("\ufffd") <= broken, "U+FFFD in the streamed answer: a character was cut in pieces"
        )
        seen = joined
    return "Chinese and emoji came out whole" if UNICODE in seen else "no U+FFFD (the model wrote other text)"


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


def check_seed(target: Target) -> str:
    """At temperature 1 equal seeds give equal texts."""
    texts = set()
    for prompt in PROMPTS[:3]:
        with offered("seed"):
            pair = [ask(target, prompt, temperature=1.0, seed=7).text for _ in range(2)]
        expect(pair[0] == pair[1], f"equal seeds gave {pair[0][:40]!r} and {pair[1][:40]!r}")
        texts.add(pair[0])
    return "equal seeds, equal texts (3 prompts, twice each)"


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
        sampling = Sampling(max_tokens=128, json_schema=json.dumps(schema))
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


def expect(condition: bool, sentence: str) -> None:
    """Raise `Failed` with the sentence when the condition does not hold."""
    if not condition:
        raise Failed(sentence)


@contextmanager
def offered(what: str, statuses: tuple[int, ...] = (400, 422, 501)) -> Iterator[None]:
    """A refusal with one of these statuses means that the endpoint does not offer this."""
    try:
        yield
    except EndpointError as e:
        if e.status in statuses:
            raise NotOffered(f"{what}: {e}") from None
        raise


def ask(
    target: Target,
    prompt: str,
    *,
    max_tokens: int = TOKENS,
    temperature: float = 0.0,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
) -> ChatReply:
    """One user message, one answer; greedy unless told otherwise."""
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop)
    return target.client.chat((Message("user", prompt),), sampling, target.model)


def _long_reply(target: Target) -> tuple[str, ChatReply]:
    """A prompt whose greedy answer is long enough to be cut, with the answer."""
    for prompt in PROMPTS:
        reply = ask(target, prompt)
        if len(reply.text) >= 4 and (reply.usage is None or reply.usage.completion_tokens >= 3):
            return prompt, reply
    raise NotOffered(f"cannot be seen: the model answers none of {len(PROMPTS)} prompts with 4 characters")
