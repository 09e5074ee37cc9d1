"""YAML 1.2 scalars, overrides, and errors that name the nearest key."""

import math
from pathlib import Path
from typing import Literal

import pytest
from toy_stages import DoubleRecipe, TextRecipe

from microlm.core.errors import UserError
from microlm.core.recipe import Field, Recipe, apply_overrides, build, parse_override, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("1.", 1.0), ("12", 12), ("-3", -3),
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("1_000", 1000), ("true", True), ("FALSE", False),
        ("yes", "yes"), ("off", "off"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("1e", "1e"),
        ("null", None), ("~", None), ("", None), ("1.2.3", "1.2.3"), ("'1'", "1"), (".inf", math.inf),
        ("jsonl:my.jsonl", "jsonl:my.jsonl"), ("李白", "李白"), ("[1e3, a]", [1000.0, "a"]),
    ],
)  # fmt: skip
def test_scalars_are_read_the_yaml_1_2_way(text: str, value: object) -> None:
    found = parse_yaml(text, "x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3", r"r\.yaml:3:1: .*'a' stands twice"),
        ("a: {b: 1, b: 2}", "'b' stands twice"),
        ("a: [1", r"r\.yaml:\d+:\d+"),
        ("a:\n\t- b", r"r\.yaml:2:1"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: &x [*x]", "aliases"),
        ("<<: {a: 1}", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("? [a]\n: 1", "plain text"),
        ("a: \x00", "not valid YAML"),
        ("[" * 500, "not valid YAML"),
        ("---\na: 1\n---\nb: 1", "not valid YAML"),
    ],
)
def test_bad_yaml_is_a_sentence_with_its_place(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_yaml(text, "r.yaml")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"", "empty"),
        (b"- a", "a recipe is a mapping"),
        (b"# only\n", "empty"),
    ],
)
def test_bad_recipe_files(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=told):
        read_yaml(path)


def test_recipe_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        read_yaml(tmp_path / "no.yaml")
    with pytest.raises(UserError, match="is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(tmp_path / "bom.yaml") == {"a": 1}


def test_overrides() -> None:
    data = {"a": {"b": 1}, "n": None}
    done = apply_overrides(data, ["a.b=1e-4", "a.c.d=[1, 2]", "n.x=yes", "s=a=b", "e="])
    assert done == {"a": {"b": 1e-4, "c": {"d": [1, 2]}}, "n": {"x": "yes"}, "s": "a=b", "e": None}
    assert data == {"a": {"b": 1}, "n": None}
    assert parse_override("data.source=jsonl:my.jsonl") == (["data", "source"], "jsonl:my.jsonl")
    for bad in ("x", "=1", "a..b=1", ".a=1"):
        with pytest.raises(UserError, match="expected key=value"):
            apply_overrides({}, [bad])
    with pytest.raises(UserError, match="'b' is a value"):
        apply_overrides(data, ["a.b.c=1"])
    with pytest.raises(UserError, match=r"override 'a=\[1'"):
        apply_overrides({}, ["a=[1"])


class Choice(Recipe):
    """For the error sentences."""

    kind: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    steps: int = Field(default=1, ge=1, description="steps")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"out": "x", "txt": "a"}, "r: unknown key 'txt'; did you mean 'text'?"),
        ({"out": "x", "inner": {"rat": 1}}, "r: unknown key 'inner.rat'; did you mean 'rate'?"),
        ({"out": "x", "zzzz": 1}, "r: unknown key 'zzzz'; known: fail, inner, out, parallel, seed, text"),
        ({}, "r: key 'out' is missing; add it"),
        ({"out": "x", "seed": -1}, "r: seed: input should be greater than or equal to 0 (found -1)"),
        (
            {"out": "x", "inner": {"rate": math.nan}},
            "r: inner.rate: input should be a finite number (found nan)",
        ),
        (
            {"out": "x", "parallel": {"processes": 1.5}},
            "r: parallel.processes: input should be a valid integer",
        ),
    ],
)
def test_a_wrong_field_is_one_sentence(data: dict[str, object], told: str) -> None:
    with pytest.raises(UserError) as e:
        build(TextRecipe, data, "r")
    assert str(e.value).startswith(told) and "\n" not in str(e.value)


def test_choices_keep_their_spelling() -> None:
    with pytest.raises(UserError, match="'RMSNorm' or 'LayerNorm'"):
        build(Choice, {"kind": "x"}, "r")
    assert build(Choice, {"steps": 1e3}, "r").steps == 1000
    with pytest.raises(ValueError, match="frozen"):
        Choice().steps = 3  # type: ignore[misc]


def test_inputs_are_the_set_artifact_fields() -> None:
    assert DoubleRecipe(out="x", source="y").inputs() == {"source": "y"}
    assert DoubleRecipe.input_fields() == ("source",)
    assert TextRecipe(out="x").inputs() == {}
    assert set(TextRecipe(out="x").keyed()) == {"seed", "text", "inner"}
    assert TextRecipe(out="x").keyed()["inner"] == {"rate": 0.1}
