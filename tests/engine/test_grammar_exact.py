"""Every mask of small grammars equals what an independent oracle says about every token, at every place."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jsonschema
import pytest
from grammar_words import check_masks, of_members, small_vocabulary

from microlm.core.records import Constraint
from microlm.text.tokenizer import Tokenizer

TEXT = '李白 ab"b\n'
SHORT = ("", "a", "b", "ab", "李", "李白", '"', "\n")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """All bytes, and words that cut across everything."""
    return small_vocabulary(tmp_path_factory.mktemp("words"))


def strings(alphabet: str, longest: int) -> Iterator[str]:
    """All strings of an alphabet."""
    for n in range(longest + 1):
        yield from map("".join, itertools.product(alphabet, repeat=n))


@pytest.mark.parametrize(
    "pattern",
    [
        "a{1,3}b?", "(ab|a)(bc|c)?", "[ab]{2}|12", "^a|b$", r"a\$", "a?", "李白|李[ab]?|[白李]{1,2}",
        "(李|白|a){0,2}", "a李|aba?", r"[a-c&&[^b]]{1,2}",
    ],
)  # fmt: skip
def test_masks_of_patterns(tokenizer: Tokenizer, pattern: str) -> None:
    oracle = pattern.replace("&&[^b]", "").replace("a-c", "ac")  # Python writes the intersection otherwise
    members = [s for s in strings("abc12李白$", 4) if re.fullmatch(oracle, s)]
    assert check_masks(tokenizer, Constraint("regex", pattern), *of_members(members), 12) >= 1


@pytest.mark.parametrize(
    "choices",
    [
        ["yes"],
        ["a", "ab", "aba"],
        ["李白", "李", "a李"],
        ['"quoted"', "a/b", "a\\b", "a\nb", "<|im_end|>"],
        ["12", "1"],
    ],
)
def test_masks_of_choices(tokenizer: Tokenizer, choices: list[str]) -> None:
    value = json.dumps(choices)
    assert check_masks(tokenizer, Constraint("choice", value), *of_members(choices), 30) >= 1


def nested(n: int) -> str:
    """A member of the language a^n c b^n."""
    return "a" * n + "c" + "b" * n


@pytest.mark.parametrize(
    "grammar",
    ['start: "a" start "b" | "c"', 'root ::= "a" root "b" | "c"\n'],
    ids=["lark", "gbnf"],
)
def test_masks_of_a_recursive_grammar(tokenizer: Tokenizer, grammar: str) -> None:
    completable, whole = of_members(nested(n) for n in range(20))
    assert check_masks(tokenizer, Constraint("grammar", grammar), completable, whole, 9) > 20


def fitting(schema: dict[str, Any], values: Iterable[Any]) -> list[str]:
    """The compact JSON of the values that fit, by another's validator; properties in the schema's order."""
    validator = jsonschema.Draft202012Validator(schema)
    order = list(schema.get("properties", {}))
    return [
        json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        for value in values
        if validator.is_valid(value)
        and (
            not isinstance(value, dict)
            or [k for k in value if k in order] == [k for k in order if k in value]
        )
        and (
            not isinstance(value, dict)
            or [k in order for k in value] == sorted((k in order for k in value), reverse=True)
        )
    ]


def objects(keys: Iterable[str], values: Iterable[Any], most: int) -> Iterator[dict[str, Any]]:
    """All objects of at most so many pairs, in every order."""
    values = list(values)
    for n in range(most + 1):
        for names in itertools.permutations(keys, n):
            for chosen in itertools.product(values, repeat=n):
                yield dict(zip(names, chosen, strict=True))


def lists(values: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """All lists of at most so many values."""
    values = list(values)
    for n in range(most + 1):
        yield from map(list, itertools.product(values, repeat=n))


def closed(**properties: Any) -> dict[str, Any]:
    """An object of these properties only."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


ONE = {"const": 12}
FEW = {"enum": ["a", 12, None, "李"]}
SCHEMAS: list[tuple[dict[str, Any], list[Any]]] = [
    (FEW, ["a", 12, None, "李", "b", 1, 0]),
    ({"type": ["boolean", "null"]}, [True, False, None, 0, "true"]),
    ({"type": "integer", "minimum": 7, "maximum": 12}, list(range(-5, 30))),
    ({"type": "array", "items": FEW, "maxItems": 2}, list(lists(FEW["enum"], 3))),
    ({"type": "array", "items": {"const": 0}, "minItems": 1, "maxItems": 3}, list(lists([0], 4))),
    (
        {"type": "array", "prefixItems": [{"const": "a"}, FEW], "items": False, "minItems": 1},
        list(lists(["a", 12, None, "李"], 3)),
    ),
    (closed(a=FEW, ab={"const": 1}), list(objects(["a", "ab", "b"], ["a", 12, None, "李", 1], 2))),
    (closed(a=FEW, b=FEW) | {"required": ["b"]}, list(objects(["a", "b"], FEW["enum"], 2))),
    (
        closed(a={"anyOf": [FEW, closed(b={"const": 1})]}),
        list(objects(["a"], [*FEW["enum"], {}, {"b": 1}], 1)),
    ),
]


@pytest.mark.parametrize(("schema", "values"), SCHEMAS, ids=range(len(SCHEMAS)))
@pytest.mark.parametrize("copied", [False, True])
def test_masks_of_schemas(
    tokenizer: Tokenizer, schema: dict[str, Any], values: list[Any], copied: bool
) -> None:
    """None of these has a free string: with a text to copy from they are the same."""
    constraint = Constraint("json_schema", json.dumps(schema), "another text" if copied else None)
    members = fitting(schema, values)
    assert 0 < len(members) <= len(values)
    assert check_masks(tokenizer, constraint, *of_members(members), 40) > 1


def copies(text: str, words: bool = False) -> set[str]:
    """All that may be copied, by slicing."""
    units = re.findall(r"[a-z]+|[\s\S]", text) if words else list(text)
    parts = {"".join(units[i:j]) for i in range(len(units)) for j in range(i + 1, len(units) + 1)}
    return {p for p in parts if p == p.strip()} if words else parts


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("text", [TEXT, "ab ba ab, c", "李白", "aaaa", " a  b "])
def test_masks_of_copies(tokenizer: Tokenizer, text: str, words: bool) -> None:
    constraint = Constraint("copy", copy_from=text, copy_words=words)
    assert check_masks(tokenizer, constraint, *of_members(copies(text, words)), 30) > 1


STRING = {"type": "string"}
COPIED: list[tuple[dict[str, Any], Any]] = [
    (STRING, lambda found: found),
    ({"type": "string", "minLength": 2, "maxLength": 3}, lambda found: found),
    ({"anyOf": [STRING, FEW]}, lambda found: [*found, *FEW["enum"]]),
    ({"type": ["string", "null"], "maxLength": 2}, lambda found: [*found, None]),
    ({"type": "array", "items": STRING | {"maxLength": 1}, "maxItems": 2}, lambda found: lists(found, 2)),
    (
        closed(a=STRING, b=ONE),
        lambda found: (x | y for x in objects("a", found, 1) for y in objects("b", [12], 1)),
    ),
    (
        {"type": "object", "additionalProperties": ONE, "minProperties": 1, "maxProperties": 1,
         "propertyNames": {"maxLength": 3}},
        lambda found: objects(found, [12], 1),
    ),
    (
        closed(a=ONE) | {"required": ["a"], "additionalProperties": {"const": 0}, "maxProperties": 2},
        lambda found: ({"a": 12} | y for y in objects(found - {"a"}, [0], 1)),
    ),
    ({"type": "string", "pattern": "^[ab]{1,2}$"}, lambda found: ["a", "b", "aa", "ab", "ba", "bb"]),
    (
        {"$ref": "#/$defs/pair", "$defs": {"one": {"type": "string", "maxLength": 2}, "pair":
         {"type": "array", "prefixItems": [{"$ref": "#/$defs/one"}, FEW], "items": False, "minItems": 2}}},
        lambda found: ([x, y] for x in found for y in FEW["enum"]),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "values"), COPIED, ids=range(len(COPIED)))
@pytest.mark.parametrize("text", ["李白a", 'a"\nb', "ab ab"])
def test_masks_of_schemas_with_copies(
    tokenizer: Tokenizer, schema: dict[str, Any], values: Any, text: str
) -> None:
    members = fitting(schema, values(copies(text)))
    constraint = Constraint("json_schema", json.dumps(schema), text)
    assert check_masks(tokenizer, constraint, *of_members(members), 60) > 1


CLOSERS = {"{": "}", "[": "]"}
ENDINGS = [
    "",
    "0",
    "rue",
    "ue",
    "e",
    "alse",
    "lse",
    "se",
    "ull",
    "ll",
    "l",
    ":0",
    *('"', '":0', '"":0', 'n"', 'n":0'),
]


def is_object(text: str) -> bool:
    """Whether a text is a JSON object written compactly, without the escapes that we leave out."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    outside = re.sub(r'"(?:\\.|[^"\\])*"', "", text)
    return isinstance(value, dict) and not re.search(r"\s", outside) and not re.search(r"\\[u/]", text)


def completed(text: str) -> bool:
    """Whether some ending makes an object of a beginning: one of a few, and the brackets that are open."""
    plain = re.sub(r'"(?:\\.|[^"\\])*"', "", text).partition('"')[0]
    open_ones: list[str] = []
    for c in plain:
        if c in CLOSERS:
            open_ones.append(CLOSERS[c])
        elif c in "]}" and (not open_ones or open_ones.pop() != c):
            return False
    closing = "".join(reversed(open_ones))
    return any(is_object(text + ending + closing) for ending in (*ENDINGS, "{}", '{"":0}'))


def test_masks_of_any_object_along_real_answers(tokenizer: Tokenizer) -> None:
    """The language is endless: at each place of some answers every ASCII word is judged by trying endings."""
    from microlm.engine.grammar import Grammars

    words = {i: w.decode() for i, w in enumerate(tokenizer.token_bytes) if w.isascii() and w}
    for answer in ("{}", '{"a":{"b":[1,-0.5,"x\\n\\"",null,{}],"":true},"c":"李"}', '{"ab":[[],[0,false]]}'):
        matcher = Grammars(tokenizer).matcher(Constraint("json_object"))
        before = ""
        for token in tokenizer.encode(answer):
            allowed = matcher.allowed()
            for i, word in words.items():
                if i not in tokenizer.control.values() and "\x7f" not in word:  # llguidance escapes it
                    assert allowed[i] == completed(before + word), (before, word)
            assert matcher.consume(token)
            before += tokenizer.token_bytes[token].decode("utf-8", "ignore")
            if "李"[0] in before:
                break  # half characters are judged above
        assert matcher.stopped == is_object(before)
