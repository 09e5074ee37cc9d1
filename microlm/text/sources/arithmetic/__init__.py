"""Word problems with the steps to their answer as thinking, in Chinese and English, composed by number.

Enters: `COUNT` or `COUNT@SEED`. Leaves: `Problems`, blocks of conversations. No computation with the same
numbers comes twice, in either order, so one that is held out is nowhere in training.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from microlm.core import runtime
from microlm.core.artifact import hash_file
from microlm.core.errors import UserError
from microlm.core.records import Conversation
from microlm.text.read import Drop
from microlm.text.sources.marked import answered

TASK, LICENCE = "arithmetic", "Apache-2.0"
BLOCK = 2_000
WORDING = Path(__file__).with_name("wording.json")
CHINESE_SHARE = 0.5
OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv,
}  # fmt: skip
SIGNS = {"*": "×", "/": "÷"}
_PLACE = re.compile(r"([1-9][0-9]{0,8})(?:@([0-9]{1,9}))?")
_NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?")
_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Problems:
    """The problems `start` to `stop` of an order that the seed draws."""

    seed: int
    start: int
    stop: int
    consumed: int = 0
    expected: str = "messages"
    task: str = ""

    def objects(self) -> Iterator[tuple[str, dict[str, Any] | Drop]]:
        """`(arithmetic:number, record)`, in OpenAI's form."""
        for number in range(self.start, self.stop):
            yield f"{TASK}:{number}", compose(self.seed, number)


def parse(place: str) -> tuple[int, int]:
    """`COUNT[@SEED]` → count and seed, or a UserError."""
    found = _PLACE.fullmatch(place)
    if not found:
        raise UserError(f"{TASK}:{place}: write how many problems, as in {TASK}:20000 (or {TASK}:20000@SEED)")
    count = int(found[1])
    if count > total():
        raise UserError(f"{TASK}:{place}: there are {total():,} problems; ask for fewer")
    return count, int(found[2] or 0)


def blocks(count: int, seed: int) -> Iterator[Problems]:
    """The first `count` problems."""
    for start in range(0, count, BLOCK):
        yield Problems(seed, start, min(count, start + BLOCK))


def fingerprint() -> str:
    """Of the wordings, which the problems follow from."""
    return hash_file(WORDING)


def compose(seed: int, number: int) -> dict[str, Any]:
    """The problem at a place of the order: a question, the steps as thinking, a short answer."""
    tables, index = _tables(), _index(seed, number)
    rng = runtime.rng(seed, "arithmetic", index)
    computation, values = _values(index)
    if "either" in computation and rng.random() < 0.5:
        values["a"], values["b"] = values["b"], values["a"]
    lang = "zh" if rng.random() < CHINESE_SHARE else "en"
    words = tables[lang]
    who, other = rng.sample(words["people"], 2)
    thing, unit = rng.choice(words["things"])
    question, reasons = rng.choice(computation[lang])
    steps = []
    for (name, left, sign, right), reason in zip(computation["steps"], reasons, strict=True):
        values[name] = OPERATIONS[sign](values[left], values[right])
        equation = f"{values[left]} {SIGNS.get(sign, sign)} {values[right]} = {values[name]}"
        steps.append(f"{reason}{'：' if lang == 'zh' else ': '}{equation}".format(**values))
    filled = {"who": who, "other": other, "thing": thing, "unit": unit, **values}
    answer = {"role": "assistant", "content": words["answer"].format(**filled)}
    return {
        "messages": [
            {"role": "user", "content": question.format(**filled)},
            answer | {"reasoning_content": "\n".join(steps)},
        ],
        "task": TASK,
        "source": f"{TASK}:{index}",
        "licence": LICENCE,
    }


def total() -> int:
    """How many problems there are: numbers times computations."""
    return sum(_size(computation) for computation in _tables()["computations"])


def answer_of(text: str) -> Decimal | None:
    """The last number that an answer says, its thinking aside; None where it says none.

    Commas between digits do not count. Thinking that was not closed has no answer after it.
    """
    if text.lstrip().startswith(_OPEN) and _CLOSE not in text:
        return None
    found = _NUMBER.findall(answered(text).content)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


def gold(chat: Conversation) -> Decimal:
    """The answer of a problem: the number that its last message, the assistant's, ends with."""
    last = chat.messages[-1]
    found = answer_of(last.content) if last.role == "assistant" else None
    if found is None:
        raise UserError(f"{chat.source}: does not end with an answer that says a number; use {TASK} problems")
    return found


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(WORDING.read_text(encoding="utf-8"))
    return tables


def _size(computation: Mapping[str, Any]) -> int:
    sizes = {name: high - low + 1 for name, (low, high) in computation["numbers"].items()}
    if "either" in computation:  # a and b of one range, in whose order nothing lies: pairs a ≤ b
        count = sizes.pop("a")
        sizes["b"] = count * (count + 1) // 2
    return math.prod(sizes.values())


def _index(seed: int, number: int) -> int:
    """Each number its own index: steps of about the golden ratio, which meet every index once."""
    count = total()
    step = round(count * 0.6180339887)
    while math.gcd(step, count) > 1:
        step += 1
    return (runtime.derive_seed(seed, "arithmetic") + number * step) % count


def _values(index: int) -> tuple[Mapping[str, Any], dict[str, int]]:
    """The computation and the numbers that an index stands for, those that are given included."""
    for computation in _tables()["computations"]:
        if index < _size(computation):
            break
        index -= _size(computation)
    values: dict[str, int] = {}
    numbers = dict(computation["numbers"])
    if "either" in computation:
        low, high = numbers.pop("a")
        del numbers["b"]
        count = high - low + 1
        index, pair = divmod(index, count * (count + 1) // 2)
        larger = (math.isqrt(8 * pair + 1) - 1) // 2
        values |= {"a": low + pair - larger * (larger + 1) // 2, "b": low + larger}
    for name, (low, high) in numbers.items():
        index, rest = divmod(index, high - low + 1)
        values[name] = low + rest
    for name, left, sign, right in computation["given"]:
        values[name] = OPERATIONS[sign](values[left], values[right])
    return computation, values
