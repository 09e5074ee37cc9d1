"""A damaged tokenizer.json is one sentence, or it is read right: never a traceback, never other ids."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from bpe_vocabularies import CORPUS, aligned, byte_level, with_merges
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.core.errors import UserError
from microlm.text.bpe import vocabulary
from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import MARKS, Tokenizer

WHOLE = aligned(Pieces()).to_str()
ODD: list[Any] = [None, True, -1, 0, 3, 1 << 31, 1 << 63, 10**30, 0.5, "", "x", "李", [], ["a"], {}, {"a": 1}]


def load(folder: Path, content: str | bytes) -> Tokenizer:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    (folder / "tokenizer.json").write_bytes(data)
    return Tokenizer.load(folder)


def holds(tokenizer: Tokenizer) -> None:
    """What was read is sound: ids within the vocabulary, ours = those of the library, the text comes back."""
    expected = [tokenizer._plain.encode(text, add_special_tokens=False).ids for text in CORPUS]
    tokenizer.start()
    tokenizer._asked = 10**9
    assert tokenizer.encode_batch(CORPUS * 3) == expected * 3
    assert all(0 <= i < tokenizer.vocab_size for ids in expected for i in ids)
    assert not set(tokenizer.control.values()) & {i for ids in expected for i in ids}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON tree."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


PLACES = places(json.loads(WHOLE))
STRUCTURE = [path for path in PLACES if len(path) < 3 or path[0] == "added_tokens"]


def changed(path: tuple[Any, ...], value: Any) -> str:
    """The file with one value replaced; ... takes it away."""
    data = json.loads(WHOLE)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if not path:
        return json.dumps(value)
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(data)


@given(
    path=st.sampled_from(STRUCTURE) | st.sampled_from(PLACES),
    value=st.sampled_from([*ODD[:-4], [], {}, "a b"]),
)
@settings(max_examples=60)
def test_one_value_of_another_type(folder: Path, path: tuple[Any, ...], value: Any) -> None:
    try:
        tokenizer = load(folder, changed(path, value))
    except UserError as e:
        assert str(folder) in str(e) and "\n" not in str(e)
        return
    if tokenizer.backend == "compiled":
        holds(tokenizer)


@pytest.mark.parametrize("path", [p for p in STRUCTURE if p], ids=lambda p: "-".join(map(str, p)))
def test_one_value_is_missing(folder: Path, path: tuple[Any, ...]) -> None:
    try:
        tokenizer = load(folder, changed(path, ...))
    except UserError as e:
        assert str(folder) in str(e)
        return
    if tokenizer.backend == "compiled":
        holds(tokenizer)


@given(cut=st.integers(0, len(WHOLE) - 1))
@settings(max_examples=60)
def test_a_file_that_is_cut_off(folder: Path, cut: int) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer file .*; make it again"):
        load(folder, WHOLE[:cut])


@given(seed=st.integers(0, 10_000))
@settings(max_examples=80)
def test_bytes_that_are_changed(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(WHOLE.encode())
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] = rng.choice(b'{}[]":,0189ae\\\x00\xff \n')
    try:
        tokenizer = load(folder, bytes(data))
    except UserError as e:
        assert "\n" not in str(e)
        return
    if tokenizer.backend == "compiled":
        holds(tokenizer)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["model"]["vocab"].update(a=5000000000), "id of 'a' is not a whole number"),
        (lambda d: d["model"]["vocab"].update(a=-1), "id of 'a' is not a whole number"),
        (lambda d: d["model"]["vocab"].update(a=True), "id of 'a' is not a whole number"),
        (lambda d: d["model"]["vocab"].update(a=d["model"]["vocab"]["b"]), "have the same id"),
        (
            lambda d: d["model"]["merges"].append(["a", "nowhere"]),
            "names 'nowhere', which is not in model.vocab",
        ),
        (lambda d: d["model"]["merges"].append(["Ń", "Ń"]), "names"),
        (lambda d: d["model"]["merges"].append("abc"), "is not a pair of tokens"),
        (lambda d: d["model"]["merges"].append(["a", 3]), "is not a pair of tokens"),
        (lambda d: d["added_tokens"][2].update(id=7), "id 7 of the added token '<|im_end|>' is not its own"),
        (lambda d: d["added_tokens"].append(d["added_tokens"][2]), "'<|im_end|>' is there twice"),
        (lambda d: d["added_tokens"][1].update(special="yes"), "is not true or false"),
        (
            lambda d: d["added_tokens"].append({**d["added_tokens"][0], "content": "new", "id": 99_999}),
            "99999",
        ),
        (lambda d: d["model"].update(type="Wonder"), "not a tokenizer file"),
        (lambda d: d.update(model=[]), "model: expected an object, found list"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, change: Any, sentence: str) -> None:
    data = json.loads(WHOLE)
    change(data)
    with pytest.raises(UserError, match=sentence):
        load(folder, json.dumps(data))


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"model":' * 5_000,
        WHOLE.replace('"vocab":{', '"vocab":{"\\ud800":9,', 1),
        WHOLE.replace('"<|im_end|>":2', '"<|im_end|>":' + "9" * 5_000, 1),
        WHOLE.replace('"<|im_end|>":2', '"<|im_end|>":NaN', 1),
        WHOLE.encode("utf-16"),
    ],
    ids=["deep lists", "deep objects", "surrogate", "digits", "nan", "utf-16"],
)
def test_hostile_files(folder: Path, content: str | bytes) -> None:
    with pytest.raises(UserError, match="not a tokenizer file"):
        load(folder, content)


def test_a_merge_that_makes_a_control_token_is_refused(folder: Path) -> None:
    """Else text of a user would become control."""
    merges = [("<", "|"), ("|", ">"), ("<|", "x"), ("<|x", "|>")]
    data = json.loads(with_merges(merges, Pieces()).to_str())
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    number = data["model"]["vocab"]["<|x|>"]
    data["added_tokens"].append({"id": number, "content": "<|x|>", "special": True, **flags})
    with pytest.raises(UserError, match=r"a merge makes the control token '<\|x\|>' out of plain text"):
        load(folder, json.dumps(data))


def test_the_last_of_two_equal_merges_counts(folder: Path) -> None:
    """As `tokenizers` reads it."""
    data = json.loads(with_merges([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], Pieces()).to_str())
    data["model"]["merges"].append(data["model"]["merges"][0])
    tokenizer = load(folder, json.dumps(data))
    expected = tokenizer.encode("abc")
    tokenizer.start()
    assert tokenizer.encode_batch(["abc"] * 500) == [expected] * 500
    assert [tokenizer.token_bytes[i] for i in expected] == [b"abc"]


def test_a_vocabulary_is_what_the_file_says(folder: Path) -> None:
    inner = byte_level(Pieces())
    inner.save(str(folder / "tokenizer.json"))
    known = vocabulary.read(folder / "tokenizer.json")
    data = json.loads(inner.to_str())
    assert known.ids == data["model"]["vocab"]
    assert [list(pair) for pair in known.merges] == data["model"]["merges"]
    assert [(t.id, t.content, t.special) for t in known.added] == [
        (t["id"], t["content"], t["special"]) for t in data["added_tokens"]
    ]
    assert known.size == inner.get_vocab_size()
    assert not {t.content for t in known.added} & set(MARKS)
