"""The built-in word problems: every step is true, no problem comes twice, the answer can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from microlm.core.errors import UserError
from microlm.core.recipe import build
from microlm.core.records import Conversation, Message
from microlm.text import prepare, sources
from microlm.text.prepare import PrepareRecipe
from microlm.text.sources import arithmetic
from microlm.text.sources.marked import answer_text
from microlm.text.split import records_of

_EQUATION = re.compile(r"(\d+) ([-+×÷]) (\d+) = (\d+)$")
EITHER = {"sum", "product", "sum, then difference", "product, then sum", "product, then difference"}
_SIGNS = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__, "÷": int.__floordiv__}


def problems(word: str) -> list[Conversation]:
    found = sources.read(sources.parse(word), sources.Tally(), strict=True)
    return [record for record in found if isinstance(record, Conversation)]


def test_every_step_is_true_and_leads_to_the_answer() -> None:
    found = problems("arithmetic:6000")
    assert len(found) == 6000 and {chat.task for chat in found} == {"arithmetic"}
    for chat in found:
        asked, answer = chat.messages
        known = set(re.findall(r"\d+", asked.content))
        for line in answer.reasoning.splitlines():
            equation = _EQUATION.search(line)
            assert equation, line
            left, sign, right, result = equation.groups()
            assert {left, right} <= known and left in line[: equation.start()]
            assert _SIGNS[sign](int(left), int(right)) == int(result) >= 0
            assert sign != "÷" or int(left) % int(right) == 0
            known.add(result)
        assert arithmetic.gold(chat) == int(result)
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", chat.messages[0].content)) for chat in found)
    assert 0.45 < chinese / len(found) < 0.55


def test_the_same_word_gives_the_same_problems_in_any_blocks() -> None:
    assert problems("arithmetic:5000")[:1000] == problems("arithmetic:1000")
    assert problems("arithmetic:50@1") != problems("arithmetic:50")
    parts = [sources.read_block(b) for b in sources.blocks(sources.parse("arithmetic:4500"))]
    assert [r for part in parts for r in part] == problems("arithmetic:4500") and len(parts) == 3
    assert {c.task for c in problems("sums=arithmetic:9")} == {"sums"}


def test_no_problem_comes_twice() -> None:
    """All there are: each computation with each choice of numbers once."""
    total = arithmetic.total()
    found = {arithmetic._index(7, number) for number in range(total)}
    assert len(found) == total and (min(found), max(found)) == (0, total - 1)
    values = {(c["name"], *sorted(v.items())) for c, v in map(arithmetic._values, range(total))}
    assert len(values) == total
    either = [(c, v) for c, v in map(arithmetic._values, range(total)) if c["name"] in EITHER]
    seen = {(c["name"], *sorted((v["a"], v["b"])), v.get("c")) for c, v in either}
    assert len(seen) == len(either) and {name for name, *_ in seen} == EITHER
    for c, v in either:
        assert all(low <= v[name] <= high for name, (low, high) in c["numbers"].items())


def test_held_out_problems_are_nowhere_in_training(tmp_path: Path) -> None:
    fields = {
        "out": str(tmp_path / "data"), "source": "arithmetic:1500", "fill": "none",
        "validation_share": 0.1, "parallel": {"processes": 2},
    }  # fmt: skip
    data = prepare.run(build(PrepareRecipe, fields, "data"))
    splits = [list(records_of(data.path, "conversations", split)) for split in ("train", "validation")]
    train, held_out = ({chat.source for chat in split} for split in splits)
    assert len(train) + len(held_out) == 1500 == sum(map(len, splits)) and not train & held_out
    assert 100 < len(held_out) < 200
    numbers = [{tuple(re.findall(r"\d+", c.messages[1].reasoning)) for c in split} for split in splits]
    both = numbers[0] & numbers[1]
    assert not both, both


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("答：38 本。", 38), ("Answer: 1,234 apples.", 1234), ("-5", -5), ("共 3 + 4 = 7", 7), ("没有", None),
        ("<think>\n3 + 4 = 7\n</think>\n\n答：8 个。", 8), ("<think>\n3 + 4 = 7", None),
        ("<think>\n7\n</think>\n\n不知道", None), ("", None),
    ],
)  # fmt: skip
def test_the_answer_is_the_last_number_after_the_thinking(text: str, number: int | None) -> None:
    assert arithmetic.answer_of(text) == number


def test_gold_is_what_the_written_answer_says() -> None:
    for chat in problems("arithmetic:200@3"):
        assert arithmetic.answer_of(answer_text(chat.messages[-1])) == arithmetic.gold(chat)
    with pytest.raises(UserError, match="does not end with an answer that says a number"):
        arithmetic.gold(Conversation((Message("user", "3"),)))


@pytest.mark.parametrize("place", ["", "x", "0", "-3", "12@", "12@x", "10000000"])
def test_a_wrong_count_is_a_sentence(place: str) -> None:
    with pytest.raises(UserError, match="arithmetic"):
        sources.parse(f"arithmetic:{place}")
