"""Hostile and wrong constraints end in a sentence, soon; many threads may ask; masks come from a thread."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grammar_words import small_vocabulary

from microlm.core.errors import UserError
from microlm.core.records import Constraint
from microlm.engine.grammar import Grammars, compile, masks
from microlm.engine.grammar.limits import MAX_CHOICES, MAX_COPY_CHARS, MAX_DEPTH, nesting
from microlm.text.tokenizer import Tokenizer

SECONDS = 4.0  # of one core; what is not bounded here takes minutes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """All bytes, and some words."""
    return small_vocabulary(tmp_path_factory.mktemp("words"))


@pytest.fixture
def grammars(tokenizer: Tokenizer) -> Grammars:
    """Nothing compiled yet."""
    return Grammars(tokenizer)


def patterns(n: int) -> list[dict[str, Any]]:
    """Schemas that are hard to intersect."""
    return [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(n)]


def schema(value: Any, text: str | None = None) -> Constraint:
    """A constraint of a schema."""
    return Constraint("json_schema", json.dumps(value), text)


HOSTILE = {
    "a power of repetitions": Constraint("regex", "(a{1000}){1000}"),
    "a tower of repetitions": Constraint("regex", "((((a{99}){99}){99}){99}){99}"),
    "exponential automaton": Constraint("regex", "(a|b)*a(a|b){200}"),
    "nested stars": Constraint("regex", "((((a*)*)*)*)*b"),
    "optional pieces": Constraint("regex", "(a?){500}a{500}"),
    "Unicode": Constraint("regex", r"(\w{1,50}\s){1,50}"),
    "many dots": Constraint("regex", ".*a" * 40),
    "negated": Constraint("grammar", "start: A\nA: /[ab]*/ & ~/(.*)aa.{12}(.*)/"),
    "ambiguous": Constraint("grammar", 'start: start start | "a" | ""'),
    "repeated rules": Constraint("grammar", 'start: ((("a"{1,1000}){1,1000}){1,1000})'),
    "doubling rules": Constraint(
        "grammar", "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"\nstart: r0'
    ),
    "long strings": schema({"type": "string", "minLength": 100_000, "maxLength": 1_000_000}),
    "long arrays": schema(
        {"type": "array", "items": {"type": "array", "minItems": 99_999}, "minItems": 99_999}
    ),
    "merged patterns": schema({"allOf": patterns(10)}),
    "doubling references": schema(
        {
            "$ref": "#/$defs/0",
            "$defs": {**{str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(30)}, "30": {}},
        }
    ),
    "choices": Constraint("choice", json.dumps([f"number {i * 7919}" for i in range(MAX_CHOICES)])),
    "copy of a long text": Constraint(
        "copy", copy_from="".join(chr(0x4E00 + i * 7919 % 20_000) for i in range(MAX_COPY_CHARS))
    ),
    "copy of one letter": Constraint("copy", copy_from="a" * MAX_COPY_CHARS),
    "copied properties": schema(
        {
            "type": "object",
            "properties": {f"name {i}": {"type": "string", "maxLength": i + 1} for i in range(300)},
        },
        "ab c" * 500,
    ),
}


@pytest.mark.parametrize("constraint", HOSTILE.values(), ids=HOSTILE)
def test_hostile_constraints_do_not_hang(tokenizer: Tokenizer, constraint: Constraint) -> None:
    """Compiled and followed for 50 tokens, or refused; a limit that is met on the way is told, too."""
    started, rng = time.process_time(), np.random.default_rng(0)
    try:
        matcher = Grammars(tokenizer).matcher(constraint)
        for _ in range(50):
            ids = np.flatnonzero(matcher.allowed())
            if not len(ids):
                assert matcher.error
                break
            if matcher.stopped or not matcher.consume(int(rng.choice(ids))):
                break
    except UserError as e:
        assert "\n" not in str(e)
    assert time.process_time() - started < SECONDS


REFUSED = [
    (Constraint("regex", ""), "empty"),
    (Constraint("regex", "a" * 5000), "5000 characters"),
    (Constraint("regex", "(a"), "unclosed group"),
    (Constraint("regex", "(?!a)b"), "look-ahead"),
    (Constraint("regex", r"[^\s\S]"), "nothing satisfies it"),
    (Constraint("regex", "(" * 2000 + "a" + ")" * 2000), "nested"),
    (Constraint("regex", "a", "text"), "copy_from goes with"),
    (Constraint("choice", "[]"), "expected a JSON list"),
    (Constraint("choice", '["a",""]'), "not empty"),
    (Constraint("choice", "[" * 60_000), "expected a JSON list"),
    (Constraint("choice", json.dumps(["a"] * (MAX_CHOICES + 1))), "at most"),
    (Constraint("grammar", "start: foo"), 'unknown name: "foo"'),
    (Constraint("grammar", 'foo: "a"'), "no start rule"),
    (Constraint("grammar", "start: start"), "nothing satisfies it"),
    (Constraint("grammar", 'root ::= "a" ('), "not GBNF"),
    (Constraint("grammar", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000), "not GBNF"),
    (Constraint("grammar", "start: " + "(" * 9000 + '"a"' + ")" * 9000), "too deeply nested"),
    (Constraint("grammar", 'start: "a" <|im_end|>'), "control token"),
    (Constraint("grammar", "start: <[0-5]>"), "control token"),
    (Constraint("grammar", 'start: "\ud800"'), "lone surrogate"),
    (Constraint("copy"), "copy_from is missing"),
    (Constraint("copy", copy_from=""), "holds nothing"),
    (Constraint("copy", copy_from=" \n", copy_words=True), "holds nothing"),
    (Constraint("copy", copy_from="a" * (MAX_COPY_CHARS + 1)), "characters"),
    (schema({"allOf": patterns(11)}), "11 patterns"),
    (
        schema({"type": "object", "patternProperties": {f"^p{i}": {} for i in range(101)}}),
        "101 patternProperties",
    ),
    (schema({"type": "object", "properties": {f"property {i}": {} for i in range(1500)}}), "items"),
    (schema({"const": float("inf")}), "not JSON"),
    (schema({"$ref": "#"}), "nothing satisfies it"),
    (schema({"$ref": "#"}, "text"), "nothing satisfies it"),
    (schema({"$ref": "#/$defs/a"}, "text"), "nothing is there"),
    (schema({"oneOf": [{"type": "string"}]}, "text"), "'oneOf' is not supported"),
    (schema({"type": "text"}, "text"), "'type' is 'text'"),
    (schema({"type": "string", "minLength": 5}, "text"), "holds nothing"),
    (schema({"type": "string", "maxLength": 0}, "text"), "holds nothing"),
    (schema({"type": "string", "maxLength": "3"}, "text"), "expected a number"),
    (schema({"type": "string", "maxLength": 10**18}, "text"), "expected a number"),
    (schema({"type": "string", "maxLength": 10**18}), "decimal literal"),
    (schema({"properties": ["a"]}, "text"), "'properties'"),
    (schema({"required": [1]}, "text"), "list of names"),
    (schema({"anyOf": []}, "text"), "'anyOf'"),
    (schema({"type": "array", "items": 3}, "text"), "expected a schema"),
    (schema({"type": "array", "minItems": 2, "items": False}, "text"), "more items"),
    (schema({"type": "object", "minProperties": 1, "additionalProperties": False}, "text"), "more required"),
    (
        schema({"type": "object", "patternProperties": {"a": {}}}, "text"),
        "'patternProperties' is not supported",
    ),
]


@pytest.mark.parametrize(("constraint", "words"), REFUSED, ids=range(len(REFUSED)))
def test_wrong_constraints_are_a_sentence(grammars: Grammars, constraint: Constraint, words: str) -> None:
    started = time.process_time()
    for _ in range(2):  # a refusal is not kept
        with pytest.raises(UserError) as caught:
            grammars.matcher(constraint)
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert str(caught.value).startswith(constraint.kind) and len(str(caught.value)) < 500
    assert grammars.stats.compiled == 0
    assert time.process_time() - started < SECONDS


def test_brackets_in_patterns_and_comments_are_no_depth_and_no_control_tokens(grammars: Grammars) -> None:
    grammar = "start: A // <not a token>\nA: " + " ".join([r"/[<(]/"] * (MAX_DEPTH + 5)) + ' "<|im_end|>"'
    assert grammars.matcher(Constraint("grammar", grammar)).allowed().sum() == 2
    assert nesting('{"a":[1,{"b":"[[[{{{\\"["}]}') == 3


def test_a_grammar_may_say_where_the_copy_stands(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.matcher(Constraint("grammar", 'start: "<" COPY ">"', "李白b"))
    for token in tokenizer.encode("<李白>"):
        assert matcher.allowed()[token] and matcher.consume(token)
    assert matcher.stopped and matcher.accepting


def test_what_was_compiled_is_kept_and_counted(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = Constraint("regex", "a" * 60), Constraint("regex", "b" * 60)
    for constraint in (a, a, b, a):
        grammars.matcher(constraint)
    assert (grammars.stats.compiled, grammars.stats.hits) == (2, 2)
    assert grammars.stats.compile_s > 0
    monkeypatch.setattr(compile, "KEPT_CHARS", 150)
    grammars.matcher(Constraint("regex", "c" * 60))  # b goes, it was used before a
    for constraint in (a, b):
        grammars.matcher(constraint)
    assert (grammars.stats.compiled, grammars.stats.hits) == (4, 3)


def test_many_threads_get_matchers_of_their_own(grammars: Grammars, tokenizer: Tokenizer) -> None:
    texts = [f"value {i % 5}" for i in range(200)]

    def follow(text: str) -> bool:
        matcher = grammars.matcher(Constraint("json_schema", json.dumps({"const": text})))
        ids = tokenizer.encode(json.dumps(text))
        return (
            all(grammars.begin([matcher]).wait()[0, i] and matcher.consume(i) for i in ids)
            and matcher.stopped
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(follow, texts))
    assert (grammars.stats.compiled, grammars.stats.hits) == (5, 195)


def test_a_copied_matcher_goes_its_own_way(grammars: Grammars, tokenizer: Tokenizer) -> None:
    first = grammars.matcher(Constraint("choice", '["ab","ac"]'))
    assert first.consume(tokenizer.encode("a")[0])
    other = first.copy()
    assert (first.allowed() == other.allowed()).all()
    assert first.consume(tokenizer.encode("b")[0]) and first.stopped
    assert not other.stopped and other.consume(tokenizer.encode("c")[0]) and other.stopped


def test_a_forbidden_token_ends_a_matcher(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.matcher(Constraint("regex", "[ab]+"))
    assert matcher.consume(tokenizer.encode("a")[0]) and matcher.accepting and not matcher.error
    assert not matcher.consume(tokenizer.encode("c")[0])
    assert matcher.error and not matcher.accepting and not matcher.allowed().any()


def test_control_tokens_are_never_allowed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Not even those that are shown as text, such as <think>; the EOS only where the answer may end."""
    matcher = grammars.matcher(Constraint("regex", r"[\s\S]*"))
    control = sorted(tokenizer.control.values())
    shown = [i for i in control if tokenizer.token_bytes[i]]
    assert shown
    for token in [*tokenizer.encode("a<think>"), None]:
        allowed = matcher.allowed()
        assert [i for i in control if allowed[i]] == [tokenizer.eos_id]
        assert token is None or matcher.consume(token)


def test_masks_come_in_the_order_of_the_matchers(grammars: Grammars) -> None:
    alone = [grammars.matcher(Constraint("choice", json.dumps([c]))) for c in ("a", "b", "李", "12", '"')]
    together = grammars.begin(alone).wait()
    assert (together.numpy() == np.stack([m.allowed() for m in alone])).all()
    assert grammars.begin([]).wait().shape[0] == 0


def test_masks_that_take_long_are_computed_before_anyone_waits(grammars: Grammars) -> None:
    matchers = [grammars.matcher(Constraint("json_object")) for _ in range(64)]
    for _ in range(50):
        grammars.begin(matchers).wait()
    begun = grammars.begin(matchers)
    deadline = time.monotonic() + 20
    while begun._flags is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert begun.wait().any(-1).all()


def test_quick_masks_are_left_to_who_waits(grammars: Grammars) -> None:
    """Waking a thread takes longer."""
    begun = grammars.begin([grammars.matcher(Constraint("choice", '["a"]'))])
    time.sleep(0.05)
    assert begun._flags is None
    assert begun.wait().any()


def test_who_waits_computes_what_no_thread_came_to(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy thread is not waited for; a fault in the background is raised where the masks are wanted."""
    hold, free = threading.Event(), threading.Event()
    flags = masks._flags

    def slow(*arguments: Any) -> Any:
        if threading.current_thread().name == "masks":
            hold.set()
            free.wait(20)
            raise RuntimeError("broken")
        return flags(*arguments)

    monkeypatch.setattr(masks, "_flags", slow)
    monkeypatch.setattr(masks, "HAND_OVER_S", -1.0)
    matchers = [grammars.matcher(Constraint("regex", c)) for c in "ab"]
    stuck = grammars.begin(matchers[:1])
    assert hold.wait(20)
    assert grammars.begin(matchers[1:]).wait().any()
    free.set()
    with pytest.raises(RuntimeError, match="broken"):
        stuck.wait()


def test_the_thread_ends_with_its_grammars(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def running() -> int:
        return sum(t.name == "masks" for t in threading.enumerate())

    before = running()
    several = [Grammars(tokenizer) for _ in range(5)]
    monkeypatch.setattr(masks, "HAND_OVER_S", -1.0)
    for one in several:
        one.begin([one.matcher(Constraint("choice", '["a"]'))]).wait()
    assert running() == before + 5
    del several, one
    deadline = time.monotonic() + 20
    while running() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_whether_a_text_is_whole_is_asked_in_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A tokenizer may normalise a text, or add a space: its ids are then those of another one."""
    description = json.loads((tokenizer.path / "tokenizer.json").read_text())
    description["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    matcher = Grammars(Tokenizer.load(tmp_path)).matcher(Constraint("choice", '["e\u0301","e\u0301 李白。"]'))
    found = [matcher.accepts(text) for text in ("e\u0301", "e\u0301 李白。", "e\u0301 李", "\u00e9", "")]
    assert found == [True, True, False, False, False]
    assert matcher.consume(tokenizer.encode("e")[0]) and matcher.accepts("\u0301") and not matcher.stopped
