"""The smoke checks that compare answers: earlier turns, whole characters, seeds. Enters: the target."""

from __future__ import annotations

import json

from microlm.core.client import EndpointError
from microlm.core.records import Constraint, Message, Sampling
from microlm.eval.verify.ask import PROMPTS, REFUSED, TOKENS, ask, expect, offered
from microlm.eval.verify.verdict import Failed, NotShown, Target

CONVERSATION = (
    Message("user", "My name is Ada and I live in a small house by the sea with two cats."),
    Message("assistant", "Hello Ada. A house by the sea, and two cats: that sounds very pleasant."),
    Message("user", "Who am I?"),
)
UNICODE = "你好，世界🙂é"
SEEDS = (7, 8, 9)
HOT = 2.0  # OpenAI's highest temperature: nearly every draw shows what the model has read


def check_multi_turn(target: Target) -> str:
    """Earlier turns are read: the prompt grows by their tokens, and what is drawn changes."""
    whole = ask(target, CONVERSATION).usage
    last = ask(target, CONVERSATION[-1:]).usage
    more = None
    if whole is not None and last is not None:
        more = whole.prompt_tokens - last.prompt_tokens
        needed = _tokens(target, " ".join(m.content for m in CONVERSATION[:-1]))
        sentence = (
            f"the earlier turns have {needed} tokens and add {more} to the prompt: they are cut or ignored"
        )
        expect(more >= needed and more > 0, sentence)
    changes = _history_changes_answers(target)
    expect(changes is not False, "the earlier turns change no answer at any seed: they are not read")
    if more is None and changes is None:
        raise NotShown("without usage, and without seeds that are kept, it cannot be seen what is read")
    counted = "no usage" if more is None else f"earlier turns add {more} prompt tokens"
    return f"{counted}; they change the answer" if changes else counted


def check_unicode(target: Target) -> str:
    """Chinese, emoji and accents go in and come out whole; streamed and not, the answer is the same."""
    properties = {"t": {"const": UNICODE}}
    schema = {"type": "object", "properties": properties, "required": ["t"], "additionalProperties": False}
    free = _both_ways(target, Sampling(max_tokens=TOKENS))
    try:
        constraint = Constraint("json_schema", json.dumps(schema))
        bound = _both_ways(target, Sampling(max_tokens=100, constraint=constraint))
    except EndpointError as e:
        if e.status not in REFUSED:
            raise
        bound = ""
    expect("\ufffd" not in bound, "U+FFFD in an answer bound to whole characters")
    echo = _bound_text(bound)
    expect(echo in (None, UNICODE), f"{UNICODE!r}, which the schema demands, came back as {echo!r}")
    if echo == UNICODE or UNICODE in free:
        return "Chinese and emoji came out whole"
    # A barely trained model writes broken bytes itself, but only the bound answer can show that it does.
    expect("\ufffd" not in free, "U+FFFD in the answer, and no answer came out whole: a character is cut")
    return "no U+FFFD (the model wrote other text)"


def check_seed(target: Target) -> str:
    """At temperature 1 equal seeds give equal texts; there, or hotter, another seed gives another text."""
    texts = {}
    for prompt in PROMPTS[:3]:
        with offered("seed"):
            pair = [ask(target, prompt, temperature=1.0, seed=SEEDS[0]).text for _ in range(2)]
        expect(pair[0] == pair[1], f"equal seeds gave {pair[0][:40]!r} and {pair[1][:40]!r}")
        texts[prompt] = pair[0]
    for seed in SEEDS[1:]:
        for prompt, text in texts.items():
            if ask(target, prompt, temperature=1.0, seed=seed).text != text:
                return "equal seeds, equal texts (3 prompts, twice each); another seed, another text"
    try:
        return _seeds_change_hot_texts(target)
    except EndpointError as e:
        if e.status in REFUSED:
            raise NotShown(f"no seed changes a text at temperature 1, and hotter is refused: {e}") from None
        raise


def _seeds_change_hot_texts(target: Target) -> str:
    """What tells a model sure of its answers (nothing shown) from a seed that fixes them (`Failed`)."""
    for prompt in PROMPTS[:3]:
        if len({ask(target, prompt, temperature=HOT, seed=seed).text for seed in SEEDS}) > 1:
            return f"equal seeds, equal texts; another seed, another text at temperature {HOT:g}"
    for prompt in PROMPTS[:3]:  # one text in common may be chance: only draws that never repeat are evidence
        if len({ask(target, prompt, temperature=HOT).text for _ in range(4)}) < 4:
            raise NotShown("the model repeats its texts at every seed and at none: no seed can be told apart")
    raise Failed("another seed changes no text, but without a seed all texts differ")


def _tokens(target: Target, text: str) -> int:
    """At least nearly as many tokens as `text` has, without those of the template around it."""
    usages = [ask(target, content, max_tokens=1).usage for content in (text, ".")]
    counts = [usage.prompt_tokens if usage else 0 for usage in usages]
    return counts[0] - counts[1]


def _history_changes_answers(target: Target) -> bool | None:
    """Whether equal seeds draw another text when earlier turns are given; None when it cannot be seen."""
    texts = set()
    for seed in SEEDS:
        try:
            alone = {ask(target, CONVERSATION[-1:], temperature=HOT, seed=seed).text for _ in range(2)}
            if len(alone) > 1:
                return None
            if ask(target, CONVERSATION, temperature=HOT, seed=seed).text not in alone:
                return True
        except EndpointError as e:
            if e.status in REFUSED:
                return None
            raise
        texts |= alone
    return False if len(texts) == len(SEEDS) else None


def _both_ways(target: Target, sampling: Sampling) -> str:
    """The greedy answer, which must be the same when it is streamed, if the endpoint streams."""
    messages = (Message("user", f"请重复：{UNICODE}"),)
    whole = target.client.chat(messages, sampling, target.model).text
    try:
        stream = target.client.chat_stream(messages, sampling, target.model)
        joined = "".join(d.text for d in stream)
    except EndpointError as e:
        if e.status in REFUSED:
            return whole
        raise
    if joined != whole:
        if joined.count("\ufffd") > whole.count("\ufffd"):
            raise Failed("U+FFFD in the streamed answer: a character was cut in pieces")
        raise Failed(f"streamed the answer is {joined[:60]!r}, in one piece {whole[:60]!r}")
    return whole


def _bound_text(answer: str) -> str | None:
    """The text in an answer that follows the schema; None for any other answer."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    found = value.get("t") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None
